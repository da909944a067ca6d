"""Real processes, real signals, real kills: what a run survives, and what it loses by it (docs/checkpoints.md)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

SIGNALLED = "the same command goes on from there"


@pytest.fixture(scope="session")
def whole_rows() -> list[dict]:
    return []


@pytest.fixture
def whole(trainer, whole_rows, one_rank) -> list[dict]:
    """The metrics of 6 steps that nothing disturbs, trained once for all tests."""
    if not whole_rows:
        assert trainer.here("whole", "steps=6") == 0
        whole_rows += trainer.rows("whole")
    return whole_rows


def test_a_signal_wherever_it_comes(trainer, whole):
    """One run, signalled in turn while it starts, in a step, in a validation and in a save, and always gone on with."""
    code, error = trainer.run("run", "steps=6", faults=[{"at": "build", "do": "SIGTERM"}])
    assert code == 0 and "ended by SIGTERM" in error and not (trainer.folder / "run" / "metrics.jsonl").exists()

    code, error = trainer.run("run", "steps=6", faults=[{"at": "step", "step": 1, "do": "SIGINT"}])
    assert code == 0 and SIGNALLED in error and trainer.steps("run") == [1]

    code, error = trainer.run("run", "steps=6", "data.workers=2", faults=[{"at": "validation", "do": "SIGTERM"}])
    assert code == 0 and SIGNALLED in error and trainer.steps("run") == [2, 3]
    assert "eval/loss" not in trainer.rows("run")[-1]

    code, error = trainer.run("run", "steps=6", faults=[{"at": "save", "step": 4, "do": "SIGTERM"}])
    assert code == 0 and SIGNALLED in error and trainer.steps("run")[-1] >= 4

    assert trainer.here("run", "steps=6") == 0
    assert trainer.rows("run") == whole


@pytest.mark.slow
def test_a_signal_in_the_last_validation_owes_it(trainer, whole):
    code, error = trainer.run("run", "steps=6", "eval.every=6", faults=[{"at": "validation", "do": "SIGTERM"}])
    assert code == 0 and trainer.steps("run") == [4, 6] and "eval/loss" not in trainer.rows("run")[-1]
    code, error = trainer.run("run", "steps=6", "eval.every=6")
    assert code == 0 and trainer.rows("run")[-1] == whole[-1]
    assert "is complete" in trainer.run("run", "steps=6", "eval.every=6")[1]


@pytest.mark.parametrize("place", [
    pytest.param("step", marks=pytest.mark.slow), pytest.param("save", marks=pytest.mark.slow), "commit",
])
def test_kill_9_loses_the_steps_since_the_last_checkpoint(trainer, whole, place):
    code, _ = trainer.run("run", "steps=6", faults=[
        {"at": "step", "step": 4, "do": "wait", "arg": 0.7},  # step 2's save is on the disk then
        {"at": place, "step": 4, "do": "SIGKILL"},
    ])
    assert code == -signal.SIGKILL and trainer.steps("run") == [2]
    assert trainer.here("run", "steps=6") == 0
    assert trainer.rows("run") == whole and trainer.steps("run") == [4, 6]
    assert not list((trainer.folder / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_no_number_in_a_step(trainer):
    """One is passed over; as many in a row as allowed stop the run with its state saved, and it goes on from there."""
    code, error = trainer.run("run", "steps=6", faults=[
        {"at": "step", "step": 2, "do": "nan"}, {"at": "step", "step": 4, "do": "nan", "arg": "gradient"},
    ])
    rows, skipped = trainer.rows("run"), trainer.folder / "run" / "skipped.jsonl"
    assert code == 0 and [row["train/skipped"] for row in rows] == [0, 1, 1, 2, 2, 2]
    assert "step 2 is skipped: loss nan" in error and "the gradient is not finite" in error
    told = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [(row["step"], row["why"]) for row in told] == [(2, "loss"), (4, "gradient")]
    assert told[0]["data"]["tokens"] == 4 * 64 and told[0]["tokens_hash"] == rows[1]["data/tokens_hash"]

    nan = [{"at": "step", "step": step, "do": "nan"} for step in (4, 5)]
    code, error = trainer.run("stopped", "steps=9", "guard.max_in_a_row=2", faults=nan)
    assert code == 1 and "steps 4 to 5: the loss is nan" in error and "Traceback" not in error
    assert trainer.steps("stopped") == [4, 5]
    assert trainer.run("stopped", "steps=6", "guard.max_in_a_row=2")[0] == 0
    assert [row["train/skipped"] for row in trainer.rows("stopped")] == [0, 0, 0, 1, 2, 2]


@pytest.mark.slow
def test_touching_save_saves(trainer):
    process = trainer.start("run", "steps=6", "checkpoint.every=0", faults=[
        {"at": "step", "step": s, "do": "wait", "arg": 0.6} for s in (2, 3, 4, 5)
    ])
    trainer.wait_for_step("run", 1, process)
    (trainer.folder / "run" / "save").touch()
    assert process.wait(60) == 0
    saved = trainer.steps("run")
    assert len(saved) == 2 and saved[0] in (2, 3, 4) and saved[1] == 6
    assert not (trainer.folder / "run" / "save").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_is_killed_takes_the_others_down_and_torchrun_resumes(trainer, tmp_path, ranks):
    """The first time rank 1 is killed, the second time it fails; each time all are started anew and go on."""
    assert trainer.run("whole", "steps=6", "zero=2", "micro_batch=1", ranks=ranks)[0] == 0
    begin = time.monotonic()
    code, error = trainer.run("run", "steps=6", "zero=2", "micro_batch=1", ranks=ranks, restarts=2, faults=[
        {"at": "step", "step": 3, "do": "wait", "arg": 0.7, "once": str(tmp_path / "a")},
        {"at": "step", "step": 4, "rank": 1, "do": "SIGKILL", "once": str(tmp_path / "b")},
        {"at": "step", "step": 6, "rank": 1, "do": "raise", "arg": "an error of rank 1", "once": str(tmp_path / "c")},
    ])
    assert code == 0 and time.monotonic() - begin < 120
    assert trainer.rows("run") == trainer.rows("whole")
    killed, failed = error.index("rank 1 is gone: it was killed"), error.index("RuntimeError: an error of rank 1")
    assert killed < failed < error.index("rank 1 is gone: RuntimeError: an error of rank 1; rank 0 ends, too")


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_out(trainer):
    code, error = trainer.run(
        "run", "steps=6", "watchdog.seconds=5", ranks=2, timeout=90,
        faults=[{"at": "step", "step": 4, "rank": 1, "do": "hang"}],
    )
    assert code == 1 and "no step for 5 s (watchdog.seconds)" in error
    stacks = [(trainer.folder / "run" / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "faulty.py" in stacks[1] and "in happen" in stacks[1] and "all_reduce" in stacks[0]
    assert trainer.steps("run") == [2]


def test_a_rank_that_is_killed_takes_the_other_down_within_seconds(trainer):
    """Rank 0 is put to sleep outside of any collective, so that nothing but the lifeline can tell it."""
    process = trainer.start("run", "steps=6", ranks=2, faults=[
        {"at": "step", "step": 4, "rank": 0, "do": "hang"}, {"at": "step", "step": 4, "rank": 1, "do": "SIGKILL"},
    ])
    trainer.wait_for_step("run", 3, process)
    begin = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and time.monotonic() - begin < 20
    assert "rank 1 is gone: it was killed, or crashed without a word; rank 0 ends, too" in error


@pytest.mark.slow
@pytest.mark.parametrize("place", ["build", "step", "validation", "save"])
def test_a_signal_that_is_not_heeded_ends_the_run_in_time(trainer, place):
    """Something hangs, and the signal comes from without. A save that hangs is waited for by the main thread."""
    assert trainer.run("run", "steps=2", "schedule=wsd", "schedule.decay=0")[0] == 0
    process = trainer.start("run", "steps=6", "schedule=wsd", "schedule.decay=0", "watchdog.stop_seconds=3", faults=[
        {"at": place, "do": "hang", "arg": "in C", **({"step": 4} if place in ("step", "save") else {})},
    ])
    for line in process.stderr:
        if "fault: hang" in line:
            break
    time.sleep(0.5)  # it says so a moment before it does
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and 2.5 < time.monotonic() - begin < 15
    assert "rank 0: not ended 3 s after a signal (watchdog.stop_seconds), the last checkpoint stands" in error
    assert "in happen" in (trainer.folder / "run" / "stacks" / "rank-00000.txt").read_text()
    assert trainer.steps("run") == [2]
    assert trainer.run("run", "steps=6", "schedule=wsd", "schedule.decay=0")[0] == 0


@pytest.mark.slow
def test_ranks_that_no_longer_agree_stop(trainer):
    code, error = trainer.run("run", "steps=6", "zero=0", "check.parity_every=1", ranks=2, faults=[
        {"at": "step", "step": 4, "rank": 1, "do": "perturb"},
    ])
    assert code == 1 and error.count("the ranks hold different norm.weight: a device or a collective") == 1
    assert trainer.steps("run") == [2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "zero", "kills"), [(2, 3, 12), (4, 1, 10), (4, 3, 10)])
def test_kills_of_several_ranks_at_random_moments(trainer, ranks, zero, kills):
    """The launcher and all ranks at once, as when a machine is taken away."""
    settings = ["steps=60", f"zero={zero}", "checkpoint.every=1", "eval=none", "micro_batch=1"]
    generator = random.Random(ranks + zero)
    assert trainer.run("whole", *settings, ranks=ranks)[0] == 0
    for _ in range(kills):
        process = trainer.start("killed", *settings, ranks=ranks)
        done = len(trainer.rows("killed")) if (trainer.folder / "killed" / "metrics.jsonl").exists() else 0
        trainer.wait_for_step("killed", done + 1, process)
        time.sleep(generator.uniform(0, 0.3))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == ranks and process.poll() is None
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        trainer.steps("killed")
    assert trainer.run("killed", *settings, ranks=ranks)[0] == 0
    assert trainer.rows("killed") == trainer.rows("whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("settings", [["attention=nsa", "dtype=bf16"]], ids=" ".join)
def test_50_kills_at_random_moments(trainer, settings):
    steps, generator = 400, random.Random(0)
    settings = [*settings, f"steps={steps}", "checkpoint.every=1", "checkpoint.keep=3", "eval.every=50"]
    assert trainer.run("whole", *settings)[0] == 0
    kills = 0
    while kills < 50:
        process = trainer.start("killed", *settings)
        done = len(trainer.rows("killed")) if (trainer.folder / "killed" / "metrics.jsonl").exists() else 0
        if kills % 5:
            trainer.wait_for_step("killed", done + 1, process)
        time.sleep(generator.uniform(0, 0.8))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            pytest.fail("the run ended before 50 kills; give it more steps")
        kills += 1
        trainer.steps("killed")  # whole, every one of them
    assert trainer.run("killed", *settings)[0] == 0
    assert trainer.rows("killed") == trainer.rows("whole")
