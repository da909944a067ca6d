"""Predicted beside torch's own peak of memory, of real steps on a GPU."""

from __future__ import annotations

import json

import pytest

from sieve.scripts.plan import main

pytestmark = pytest.mark.gpu
MOE = ["model=moe-1b", "model.num_layers=4"]


@pytest.mark.parametrize("seq_len", [4096, 8192])
@pytest.mark.parametrize("settings", [
    ["model=small", "attention=full", "attention.dense_impl=cudnn"], ["model=small", "attention=nsa"],
    ["model=small", "attention=nsa", "activation_checkpointing=attention"],
    ["model=small", "attention=nsa", "activation_checkpointing=block"], [*MOE, "attention=nsa"],
], ids=lambda settings: " ".join(settings))
def test_predicted_peak(settings, seq_len, tmp_path):
    out = tmp_path / "plan.json"
    rows = 16384 // seq_len
    assert main([
        *settings, "dtype=bf16", "device=cuda", f"seq_len={seq_len}", f"global_batch={rows}", f"micro_batch={rows}",
        "tokenizer.vocab_size=32768", "--measure", "--json", str(out),
    ]) == 0
    phase = json.loads(out.read_text())["measured"]["phases"][0]
    assert phase["predicted"]["peak_bytes"] == pytest.approx(phase["peak_bytes"], rel=0.15), phase
