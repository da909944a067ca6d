"""Predicted steps beside measured ones, and what has to hold of any prediction."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sieve.model.config import AttentionConfig
from sieve.model.count import flops_per_token
from sieve.train.breakdown import WAITS
from sieve.train.gpus import ATTENTION, GPUS
from sieve.train.overrides import load_config
from sieve.train.predict import Setup, attention_seconds, bus_rate, sent_bytes, step_seconds

RAW = Path(__file__).resolve().parents[2] / "benchmarks/2026-11-24-plan/small-8k.json"
ROWS = json.loads(RAW.read_text())["rows"]


def setup_of(overrides, vocab=32768, **changes):
    config = load_config(overrides)
    own = Setup(
        config.model, config.attention, config.loss, vocab, config.seq_len, config.micro_batch,
        config.global_batch // config.micro_batch, config.activation_checkpointing, config.zero.stage, 1, GPUS["h200"], 4e11,
    )
    return replace(own, **changes)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["attention"])
def test_a_measured_step(row):
    """What the GPU did in it; waits are not predicted. The attention of this very shape is among the figures."""
    predicted, parts = step_seconds(setup_of(row["settings"])), row["breakdown"]["parts"]
    busy = sum(seconds for part, seconds in parts.items() if part not in WAITS)
    assert sum(predicted.values()) == pytest.approx(busy, rel=0.1)
    assert set(predicted) == set(parts) - set(WAITS)
    for part in ("matmul", "loss", "norm and elementwise"):
        assert predicted[part] == pytest.approx(parts[part], rel=0.25), part


@pytest.mark.parametrize("model", ["small", "1b", "moe-1b", "nsa-27b"])
@pytest.mark.parametrize("attention", ["full", "nsa", "window"])
def test_no_step_is_faster_than_its_arithmetic(model, attention):
    setup = setup_of([f"model={model}", f"attention={attention}", "dtype=bf16", "seq_len=16384"])
    flops = sum(flops_per_token(setup.model, setup.attention, setup.vocab, setup.seq_len).values())
    floor = flops * setup.tokens * setup.micro_batches / 989.4e12
    assert floor < sum(step_seconds(setup).values()) < 8 * floor


def test_checkpointing_costs_what_it_computes_again():
    modes = ["none", "attention", "block", "full"]
    times = [step_seconds(setup_of(["model=small", "seq_len=8192"], mode=mode)) for mode in modes]
    none, attention, block, full = (sum(t.values()) for t in times)
    assert none < attention < block < full
    assert times[1]["selection, forward"] == times[0]["selection, forward"] == times[2]["selection, forward"] / 2
    assert times[0]["matmul"] < times[1]["matmul"] < 1.5 * times[0]["matmul"]
    kept = setup_of(["model=small", "seq_len=8192", "attention.save_outputs=false"])
    assert times[0]["gates, backward"] < step_seconds(kept)["gates, backward"]


def test_micro_batches_ranks_and_stages():
    one = setup_of(["model=1b", "attention=full", "seq_len=4096", "global_batch=4"], mode="block")
    first, second = step_seconds(one), step_seconds(replace(one, micro_batches=8))
    assert second["matmul"] == pytest.approx(2 * first["matmul"]) and second["optimizer"] == first["optimizer"]
    many = step_seconds(replace(one, ranks=8))
    assert "communication" not in first and many["optimizer"] < first["optimizer"]
    P = 10**9
    sent = [sent_bytes(replace(one, ranks=8, stage=stage), P) * 8 / 7 for stage in range(4)]
    assert sent == [8 * P, 10 * P, 4 * 8 * P + 2 * P, 4 * (4 + 3 * 2) * P]
    assert many["communication"] == pytest.approx(7 / 8 * 10 * 1_125_000_000 / 4e11, rel=0.05)
    assert bus_rate(GPUS["h200"], 8, 8, 50e9) == 450e9 and bus_rate(GPUS["h200"], 16, 8, 50e9) == 400e9


def test_attention_at_and_between_what_was_measured():
    geometry = AttentionConfig().geometry()
    for measured in ATTENTION:
        for part, times in measured.ms.items():
            for tokens, ms in times.items():
                assert attention_seconds(part, measured.shape, tokens, geometry) == pytest.approx(1e-3 * ms, rel=1e-6)
    low, middle, high = (
        attention_seconds("cudnn, forward", (64, 4, 128, 128), n, geometry) for n in (32768, 46341, 65536)
    )
    assert middle == pytest.approx(math.sqrt(low * high), rel=0.05)
    # Past the longest: by pairs.
    assert attention_seconds("cudnn, forward", (64, 4, 128, 128), 131072, geometry) == pytest.approx(4 * high, rel=1e-3)
