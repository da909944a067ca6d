"""A run whose data changes on the way: rotary embedding, length of rows, number of micro-batches, mixture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sieve.data.phases import Phase
from sieve.model.config import RopeConfig, RopeScaling
from sieve.train.overrides import load_config
from sieve.train.phases import ropes
from sieve.train.run import main, run


def test_a_phase_stretches_the_first_phases_length():
    phases = [Phase(0, 8192, 8, 1), Phase(10, 32768, 2, 1, rope_factor=4.0), Phase(20, 32768, 2, 1, rope_factor=1.0)]
    plain, stretched, again = ropes(RopeConfig(theta=5e5), phases)
    assert plain == again == RopeConfig(theta=5e5)
    assert stretched == RopeConfig(theta=5e5, scaling=RopeScaling(factor=4.0, original_seq_len=8192))


def test_a_stretched_model_keeps_what_it_was_stretched_from():
    rope = RopeConfig(scaling=RopeScaling(factor=2.0, original_seq_len=4096, beta_fast=16.0))
    first, second = ropes(rope, [Phase(0, 8192, 8, 1), Phase(10, 32768, 2, 1, rope_factor=8.0)])
    assert first == rope
    assert second.scaling == RopeScaling(factor=8.0, original_seq_len=4096, beta_fast=16.0)


def rows(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def test_a_mixture_with_a_phase_trains_and_says_what_it_read(mixture, one_rank, tmp_path, capsys):
    command = [*mixture, f"runs_dir={tmp_path}", "name=run", "attention=nsa", "steps=7", "eval.every=1"]
    assert main(command) == 0, capsys.readouterr().err
    assert "data.phases[0] begins after step 3, 768 tokens" in capsys.readouterr().err
    found = rows(tmp_path / "run")
    assert [row["tokens"] for row in found] == [256, 512, 768, 1536, 2304, 3072, 3840]
    for row in found:
        assert {"eval/letters/loss", "eval/pairs/loss", "eval/loss"} <= row.keys()
        low, high = sorted((row["eval/letters/loss"], row["eval/pairs/loss"]))
        assert low <= row["eval/loss"] <= high
        assert row["data/documents_per_row"] >= 1 and row["data/context_over_8k"] == 0
    assert [row["data/padding_share"] for row in found[:3]] == [0, 0, 0] and found[4]["data/padding_share"] > 0
    assert [(row["data/letters/tokens"], row["data/pairs/tokens"]) for row in found[:3]] == [(192, 64), (384, 128), (576, 192)]
    read = {name: found[-1][f"data/{name}/tokens"] - found[2][f"data/{name}/tokens"] for name in ("letters", "pairs")}
    assert abs(read["letters"] - read["pairs"]) <= 128
    assert "eval/loss_pos_0128" in found[3] and "eval/loss_pos_0128" not in found[2], "rows are longer in phase two"
    assert found[-1]["train/loss"] < found[0]["train/loss"]


def test_another_mixture_does_not_go_on_from_a_checkpoint(mixture, one_rank, tmp_path, capsys):
    command = [*mixture, f"runs_dir={tmp_path}", "name=run", "attention=full", "steps=2", "eval=none"]
    assert main(command) == 0
    changed = [text.replace("weight:0.75", "weight:0.5").replace("pairs:0.5", "pairs:0.25") for text in command]
    assert main([*changed, "steps=4", "data.workers=2"]) == 2
    message = capsys.readouterr().err
    assert "data.sources.letters.weight=0.5 (was 0.75)" in message and "Traceback" not in message
    assert "data.phases[0].weights.pairs=0.25 (was 0.5)" in message and "data.workers" not in message
    assert main([*command, "steps=4", "data.workers=1", "data.prefetch=3"]) == 0


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_stop_before_and_after_the_change_is_not_noticed(stage, dtype, mixture, one_rank, tmp_path):
    composed = load_config([
        *mixture, f"runs_dir={tmp_path}", "attention=[full,nsa]", "steps=6", f"zero={stage}", f"dtype={dtype}",
        "schedule.warmup=0", "schedule.decay=0", "checkpoint.every=1", "eval.every=2",
    ])
    assert run(composed.model_copy(update={"name": "whole"})) == 0
    for steps in (2, 3, 5, 6):
        assert run(composed.model_copy(update={"name": "parts", "steps": steps})) == 0
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    training = [key for key in whole[0] if key.startswith(("train/", "data/", "moe/", "nsa/")) and key != "train/lr"]
    assert [[row[key] for key in training] for row in parts] == [[row[key] for key in training] for row in whole]
    assert parts[3]["eval/loss"] == whole[3]["eval/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "nsa"])
def test_kill_and_resume_with_other_workers_across_a_phase(attention, mixture, tmp_path):
    """kill -9 in the first phase, SIGTERM to the whole group in the second: the same hashes, losses bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    settings = [
        *mixture, f"attention={attention}", "steps=60", f"runs_dir={tmp_path}", "eval.every=10", "checkpoint.every=4",
        "data.phases=[{from_tokens:6000,seq_len:128,global_batch:6,micro_batch:1,packing:best_fit,rope_factor:2,"
        "weights:{letters:0.5,pairs:0.5}}]",
    ]

    def start(name: str, workers: int) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "sieve.train", *settings, f"name={name}", f"data.workers={workers}"],
            env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )

    def signalled(process: subprocess.Popen, number: int, at: int) -> subprocess.Popen:
        metrics = tmp_path / "parts" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= at:
                (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
                break
            time.sleep(0.01)
        return process

    whole = start("whole", 0)
    assert whole.wait(300) == 0, whole.stderr.read()
    assert signalled(start("parts", 2), signal.SIGKILL, 10).wait(300) == -signal.SIGKILL
    stopped = signalled(start("parts", 4), signal.SIGTERM, 35)  # as a scheduler does: trainer and workers
    assert stopped.wait(300) == 0, stopped.stderr.read()
    assert 35 <= len(rows(tmp_path / "parts")) < 60
    last = start("parts", 1)
    assert last.wait(300) == 0, last.stderr.read()
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert rows(tmp_path / "whole")[-1]["tokens"] > 20_000


@pytest.mark.slow
def test_two_ranks_with_workers_train_as_one_across_a_phase(mixture, one_rank, tmp_path):
    settings = [*mixture, f"runs_dir={tmp_path}", "attention=nsa", "steps=7", "zero=2"]
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "sieve.train",
         *settings, "name=two", "data.workers=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )
    assert two.returncode == 0, two.stderr
    assert main([*settings, "name=one"]) == 0
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert {k: v for k, v in ours.items() if k.startswith("data/")} == {
            k: v for k, v in theirs.items() if k.startswith("data/")
        }
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
