"""A run that looks at its own attention: the numbers, and that looking changes nothing."""

from __future__ import annotations

import json

import pytest

from sieve.train.overrides import load_config
from sieve.train.run import run


def train(tiny_text, tmp_path, name: str, *settings: str) -> list[dict]:
    config = load_config([*tiny_text, "steps=4", "eval=none", f"runs_dir={tmp_path}", f"name={name}", *settings])
    assert run(config) == 0
    return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [
    ["attention=nsa"], ["attention=[full,nsa]", "dtype=bf16", "zero=3", "activation_checkpointing=block"],
    ["attention=window", "zero=0"],
], ids=" ".join)
def test_layers_take_turns_and_the_losses_stay(settings, tiny_text, one_rank, tmp_path):
    checks = ["check.attention_every=1", "check.attention_tokens=40", "check.parity_every=1"]
    plain, checked = train(tiny_text, tmp_path, "plain", *settings), train(tiny_text, tmp_path, "checked", *settings, *checks)
    assert [row["train/loss"] for row in plain] == [row["train/loss"] for row in checked]
    assert [row["check/attention_layer"] for row in checked] == [0, 1, 0, 1]
    limit = 3e-2 if "dtype=bf16" in settings else 1e-5
    assert all(0 <= row["check/attention_error"] < limit for row in checked)
    assert "check/attention_error" not in plain[0]


def test_a_kernel_that_is_wrong_is_told_of(tiny_text, one_rank, tmp_path, monkeypatch, caplog):
    from sieve.model import attention

    original = attention.attention
    monkeypatch.setattr(
        attention, "attention", lambda *args, **kw: original(*args, **kw) * (1.0 if kw["impl"] == "reference" else 1.2)
    )
    rows = train(tiny_text, tmp_path, "run", "attention=full", "check.attention_every=2", "check.attention_limit=0.1")
    assert [row.get("check/attention_error") for row in rows] == [None, pytest.approx(0.2, rel=1e-3)] * 2
    assert "step 2: layer 0's attention differs by 0.2 from the reference, more than check.attention_limit=0.1" in caplog.text
