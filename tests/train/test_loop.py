"""One step, and a run of a few: what the records say, and that they do not depend on how a batch is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from sieve.train.overrides import load_config
from sieve.train.run import run
from sieve.train.schedule import ratio

STEPS = 6


def train(tiny_text: list[str], tmp_path: Path, name: str, *settings: str) -> list[dict]:
    config = load_config([*tiny_text, f"steps={STEPS}", f"runs_dir={tmp_path}", f"name={name}", *settings])
    assert run(config) == 0
    return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def rows(tiny_text, tmp_path, one_rank) -> list[dict]:
    return train(tiny_text, tmp_path, "run", "attention=nsa", "schedule.warmup=2", "micro_batch=2")


def test_a_record_has_every_metric(rows, tmp_path):
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows] == [4 * 64 * step for step in range(1, STEPS + 1)]
    config = load_config(["schedule.warmup=2"])
    for row in rows:
        assert row["train/lr"] == pytest.approx(1e-2 * ratio(config.schedule, row["step"], STEPS))
        assert 0 < row["train/loss"] < 2 * math.log(300) and row["train/grad_norm"] > 0
        assert len(row["data/tokens_hash"]) == 32 and row["data/epoch"] == 0
        for part in ("gate_cmp", "gate_slc", "gate_win", "selected_distance", "forced_share", "selection_overlap"):
            assert f"nsa/layer_01/{part}" in row
        assert {"perf/tokens_per_second", "perf/step_seconds", "perf/peak_memory_bytes"} <= row.keys()
        assert ("eval/loss" in row) is (row["step"] % 3 == 0)
    assert len({row["data/tokens_hash"] for row in rows}) == STEPS
    assert {key for key in rows[2] if key.startswith("eval/loss_pos")} == {
        f"eval/loss_pos_{2**i:04d}" for i in range(7)
    }
    # Position 1 is a row's first token: almost nothing to go by; weights of a bucket add up to the whole.
    buckets = [rows[-1][f"eval/loss_pos_{2**i:04d}"] for i in range(7)]
    assert min(buckets) <= rows[-1]["eval/loss"] <= max(buckets)


def test_the_router_is_balanced_after_every_step(rows, tiny_text):
    # Every expert's bias moves by the rate, up or down, unless its load is the mean exactly.
    moe = load_config(tiny_text).model.moe
    rate, experts = moe.bias_update_rate, moe.num_experts
    assert 0 < rows[0]["moe/layer_01/bias_norm"] <= rate * math.sqrt(experts) * (1 + 1e-6)
    assert rows[0]["moe/layer_01/bias_norm"] >= rate * 0.999
    assert max(row["moe/layer_01/bias_norm"] for row in rows) > rate * math.sqrt(experts)
    assert all(row["moe/layer_01/load_max"] >= 1 for row in rows)


def test_the_loss_does_not_depend_on_micro_batches(rows, tiny_text, tmp_path):
    for size in (1, 4):
        cut = train(tiny_text, tmp_path, f"cut-{size}", "attention=nsa", "schedule.warmup=2", f"micro_batch={size}")
        for ours, theirs in zip(cut, rows, strict=True):
            assert ours["data/tokens_hash"] == theirs["data/tokens_hash"]
            for key in {"train/loss", "train/grad_norm", "eval/loss"} & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


SCORES = ["attention=full", "data.packing=best_fit", "model.moe.bias_update=quantile", "model.moe.bias_update_rate=1"]


def test_the_bias_by_scores_does_not_depend_on_micro_batches(tiny_text, tmp_path, one_rank):
    ours, theirs = (
        train(tiny_text, tmp_path, f"cut-{size}", *SCORES, f"micro_batch={size}") for size in (1, 4)
    )
    for row, other in zip(ours, theirs, strict=True):
        assert row["moe/layer_01/bias_norm"] > 0
        for key in ("train/loss", "moe/layer_01/bias_norm", "moe/layer_01/load_max"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def test_a_record_has_the_load_of_all_steps_since_the_last_one(tiny_text, tmp_path, one_rank, monkeypatch):
    """Which is the sum of those of single steps; the run is the same one."""
    from sieve.train.callbacks.health import Health

    loads, original = {}, Health.step

    def step(self, run, record):
        if record is not None:
            loads.setdefault(run.config.name, []).append({k: x.clone() for k, x in run.expert_load.items()})
        return original(self, run, record)

    monkeypatch.setattr(Health, "step", step)
    for every in (1, 4):
        train(tiny_text, tmp_path, f"every-{every}", "attention=full", f"log.every={every}")
    single, pooled = loads["every-1"], loads["every-4"]
    assert len(single) == STEPS and len(pooled) == math.ceil(STEPS / 4)
    for i, found in enumerate(pooled):
        for layer, load in found.items():
            assert torch.equal(load, sum(part[layer] for part in single[4 * i : 4 * i + 4]))


def test_settling_holds_the_load_while_weights_move_fast(tiny_text, tmp_path, one_rank):
    """For as many steps as it is asked for; then it is the same rule as without."""
    late, settled, part = (
        train(
            tiny_text, tmp_path, f"settle-{steps}", *SCORES, "micro_batch=4", f"model.moe.bias_settle={steps}",
            "model.moe.num_experts=16", "model.moe.top_k=2", "optim.lr=0.03", "schedule.warmup=0",
        )
        for steps in (0, STEPS, 2)
    )
    load = [[row["moe/layer_01/load_max"] for row in rows] for rows in (late, settled, part)]
    assert load[0][0] == load[1][0] and load[2][:3] == load[1][:3] and load[2][4] != load[1][4]
    assert sum(load[1][1:]) < 0.8 * sum(load[0][1:])


@pytest.mark.parametrize("settle", [0, 9])
def test_a_skipped_step_leaves_a_bias_by_scores_alone(settle, tiny_text, tmp_path, one_rank, monkeypatch):
    from sieve.train.engine import Engine

    original, calls = Engine.forward, []

    def forward(self, batch, **options):
        out = original(self, batch, **options)
        calls.append(batch)
        return out._replace(ce_sum=out.ce_sum * (torch.nan if len(calls) == 3 else 1))

    monkeypatch.setattr(Engine, "forward", forward)
    rows = train(
        tiny_text, tmp_path, "skips", "attention=full", "model.moe.bias_update=quantile", f"model.moe.bias_settle={settle}",
        "model.moe.bias_update_rate=1", "micro_batch=4", "eval=none",
    )
    norms = [row["moe/layer_01/bias_norm"] for row in rows]
    assert norms[2] == norms[1] > 0 and len(set(norms)) == STEPS - 1


def test_up_to_dense_len_an_nsa_run_is_its_full_attention_twin(tiny_text, tmp_path, one_rank):
    dense = train(tiny_text, tmp_path, "dense", "attention=nsa", "attention.dense_len=64")
    full = train(tiny_text, tmp_path, "full", "attention=full")
    for ours, theirs in zip(dense, full, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
        assert not any(key.startswith("nsa/") for key in ours)


def test_health_is_the_mean_over_the_sparse_micro_batches():
    from sieve.train.loop import _mean_of_known

    nan = torch.tensor(float("nan"))
    assert _mean_of_known([torch.tensor(1.0), nan, torch.tensor(2.0)]).item() == 1.5
    assert _mean_of_known([nan, nan]).isnan()


def test_the_run_directory_describes_the_run(rows, tmp_path):
    folder = tmp_path / "run"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["attention"]["type"] == "nsa" and config["optim"]["weight_decay"] == 0.1
    zero = json.loads((folder / "deepspeed.json").read_text())
    assert (zero["train_batch_size"], zero["train_micro_batch_size_per_gpu"], zero["gradient_accumulation_steps"]) == (4, 2, 2)
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["parameters"]["total"] > 0 and facts["dense_flops_per_token"] > 0
    assert sorted(p.name for p in folder.glob("checkpoints/step-*")) == ["step-00000004", "step-00000006"]
    assert not list(folder.glob(".*.tmp"))


def test_few_records_when_few_are_asked_for(tiny_text, tmp_path, one_rank):
    sparse = train(tiny_text, tmp_path, "sparse", "attention=full", "log.every=4", "eval.every=5")
    assert [row["step"] for row in sparse] == [4, 5, 6]
    assert "train/loss" not in sparse[1] and "eval/loss" in sparse[1] and "eval/loss" in sparse[2]


def test_twins_read_the_same_tokens(rows, tiny_text, tmp_path):
    full = train(
        tiny_text, tmp_path, "full", "attention=full", "schedule.warmup=2", f"baseline={tmp_path}/run", "dtype=bf16",
    )
    assert [row["data/tokens_hash"] for row in full] == [row["data/tokens_hash"] for row in rows]
    assert full[0]["baseline/loss_gap"] == pytest.approx(full[0]["train/loss"] - rows[0]["train/loss"])
