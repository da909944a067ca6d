"""Mixtures of experts on several ranks: experts that one rank, or every rank, leaves untouched in a step hang nothing,
and every parameter is trained as by one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sieve.model.init import initial_value
from sieve.train import checkpoint
from sieve.train.overrides import load_config
from sieve.train.run import main
from sieve.train.weights import module_weights

# One row of 16 tokens a rank and micro-batch, one expert of 24 a token: most experts are untouched in most of them.
SPARSE = [
    "model.moe.num_experts=24", "model.moe.top_k=1", "model.moe.num_shared=0", "model.moe.expert_size=8", "seq_len=16",
    "micro_batch=1", "global_batch=4", "steps=4", "model.moe.normalize_top_k=false",
    "eval=none", "checkpoint.every=4", "optim.weight_decay=0",
]
OPTIONS = [
    "model.moe.num_groups=4", "model.moe.top_groups=2", "model.moe.z_loss_coef=0.01", "model.moe.bias_update=proportional",
]
RUNS = {
    "zero0": ["zero=0"], "zero1": ["zero=1"], "zero2": ["zero=2"], "zero3": ["zero=3"],
    "zero3-block": ["zero=3", "activation_checkpointing=block"], "zero1-options": ["zero=1", *OPTIONS],
    "zero2-bf16": ["zero=2", "dtype=bf16"],
    "zero2-quantile": ["zero=2", "model.moe.bias_update=quantile", "model.moe.bias_update_rate=0.7"],
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    there = checkpoint.checkpoints(folder)
    return module_weights(checkpoint.Saved.read(there[max(there)]))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(two: Path, one: Path, bf16: bool) -> None:
    for ours, theirs in zip(rows_of(two), rows_of(one), strict=True):
        for key in theirs:
            if key.startswith("moe/") and not bf16 or key == "train/loss":
                assert ours[key] == pytest.approx(theirs[key], abs=1e-2 if bf16 else 1e-5), key
        assert any(key.startswith("moe/") for key in theirs)
        assert ours["moe/layer_01/load_max"] > 1.5  # 64 tokens on 24 experts: no step is even
    if not bf16:
        wanted = weights_of(one)
        for name, weight in weights_of(two).items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def check_moved(folder: Path, overrides: list[str]) -> None:
    """Every parameter but for experts that no token visited; without weight decay those stay as they were, to the bit."""
    config = load_config(overrides)
    moved = {}
    for name, weight in weights_of(folder).items():
        if name.endswith("router.bias"):
            assert weight.any(), name
            continue
        before = initial_value(name, weight.shape, config.model, config.seed).to(weight.dtype)
        moved[name] = (weight != before).flatten(1).any(1) if ".experts." in name else (weight != before).any()
    assert all(m.any() for m in moved.values()), [n for n, m in moved.items() if not m.any()]
    gate_up, down = (moved[f"layers.1.mlp.experts.{part}"] for part in ("gate_up", "down"))
    assert torch.equal(gate_up, down) and gate_up.sum() > 6


def run_two(tiny_text: list[str], folder: Path, runs: dict[str, list[str]]) -> None:
    lists = [[*tiny_text, *SPARSE, f"runs_dir={folder}", f"name=two-{name}", *own] for name, own in runs.items()]
    (folder / "runs.json").write_text(json.dumps(lists))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("many_runs.py")), str(folder / "runs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=550,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_ranks_train_untouched_experts_as_one(tiny_text, tmp_path, one_rank):
    run_two(tiny_text, tmp_path, RUNS)
    for name, own in RUNS.items():
        overrides = [*tiny_text, *SPARSE, f"runs_dir={tmp_path}", f"name=one-{name}", *own]
        assert main(overrides) == 0
        compare(tmp_path / f"two-{name}", tmp_path / f"one-{name}", "dtype=bf16" in own)
        if "dtype=bf16" not in own:
            check_moved(tmp_path / f"two-{name}", overrides)


@pytest.mark.slow
def test_two_ranks_settle_their_biases_alike(tiny_text, tmp_path, one_rank):
    """The beginnings of a rank's rows find the bias; as stages do the same, so do they find the same."""
    own = ["model.moe.bias_update=quantile", "model.moe.bias_update_rate=1", "model.moe.bias_settle=3"]
    run_two(tiny_text, tmp_path, {name: [*own, *RUNS[name]] for name in ("zero0", "zero3", "zero3-block")})
    wanted = rows_of(tmp_path / "two-zero0")
    assert all(row["moe/layer_01/bias_norm"] > 0 for row in wanted)
    for name in ("zero3", "zero3-block"):
        compare(tmp_path / f"two-{name}", tmp_path / "two-zero0", bf16=False)


def test_one_rank_and_micro_batches_count_the_same_load(tiny_text, tmp_path, one_rank):
    """moe/ metrics and the bias do not depend on how the global batch is cut; and every parameter moves."""
    found = {}
    for size in (1, 4):
        overrides = [*tiny_text, *SPARSE, f"runs_dir={tmp_path}", f"name=micro-{size}", f"micro_batch={size}", *OPTIONS]
        assert main(overrides) == 0
        check_moved(tmp_path / f"micro-{size}", overrides)
        found[size] = rows_of(tmp_path / f"micro-{size}")
    # The z-loss is a mean over a micro-batch, so that its gradient does depend on them: the first step alone is equal.
    for key, value in found[4][0].items():
        if key.startswith("moe/"):
            assert found[1][0][key] == pytest.approx(value, abs=1e-6), key
