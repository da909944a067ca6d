import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sieve.train.callbacks.jsonl import Jsonl
from sieve.train.rundir import read_metrics


def lines(state) -> list[dict]:
    return [json.loads(line) for line in (state.directory / "metrics.jsonl").read_text().splitlines()]


def steps(callback: Jsonl, state, first: int, last: int) -> None:
    for step in range(first, last + 1):
        callback.step(state, {"step": step, "train/loss": 1.0 / step})


def test_a_line_is_readable_as_soon_as_its_step_ends(make_state) -> None:
    callback, state = Jsonl(), make_state()
    callback.start(state)
    callback.step(state, {"step": 1, "train/loss": 2.5})
    callback.step(state, None)
    assert lines(state) == [{"step": 1, "train/loss": 2.5}]


def test_an_evaluation_joins_the_line_of_its_step(make_state) -> None:
    callback, state = Jsonl(), make_state()
    callback.start(state)
    steps(callback, state, 1, 2)
    callback.evaluated(state, {"step": 2, "eval/loss": 3.0})
    steps(callback, state, 3, 3)
    callback.evaluated(state, {"step": 5, "eval/loss": 2.0})  # step 5 was not logged
    callback.end(state, "finished")
    assert lines(state) == [
        {"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5, "eval/loss": 3.0},
        {"step": 3, "train/loss": 1 / 3}, {"step": 5, "eval/loss": 2.0},
    ]


def test_a_resumed_run_without_room_says_for_what(make_state) -> None:
    callback, state = Jsonl(), make_state()
    callback.start(state)
    steps(callback, state, 1, 2)
    callback.end(state, "finished")
    state.resumed_from = 2
    (state.directory / "metrics.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        Jsonl().start(state)
    assert caught.value.filename == str(state.directory / "metrics.jsonl")
    assert len(lines(state)) == 2


def test_a_merged_line_that_gets_shorter_leaves_no_rest(make_state) -> None:
    callback, state = Jsonl(), make_state()
    callback.start(state)
    callback.step(state, {"step": 1, "a": "x" * 100})
    callback.evaluated(state, {"step": 1, "a": "y"})
    assert lines(state) == [{"step": 1, "a": "y"}]


def test_resume_cuts_later_steps_and_a_torn_line(make_state) -> None:
    first, state = Jsonl(), make_state()
    first.start(state)
    steps(first, state, 1, 9)
    with (state.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/')
    again, state = Jsonl(), make_state(resumed_from=6)
    again.start(state)
    assert [line["step"] for line in lines(state)] == [1, 2, 3, 4, 5, 6]
    steps(again, state, 7, 8)
    again.end(state, "stopped")
    third = Jsonl()
    third.start(make_state(resumed_from=8))
    steps(third, state, 9, 9)
    assert lines(state) == [{"step": step, "train/loss": 1.0 / step} for step in range(1, 10)]


def test_an_evaluation_owed_at_a_resume_joins_the_line_written_before_it(make_state) -> None:
    first, state = Jsonl(), make_state()
    first.start(state)
    steps(first, state, 1, 4)
    again = Jsonl()
    again.start(make_state(resumed_from=3))
    again.evaluated(state, {"step": 3, "eval/loss": 9.0})
    steps(again, state, 4, 4)
    evaluations = [(line["step"], line.get("eval/loss")) for line in lines(state)]
    assert evaluations == [(1, None), (2, None), (3, 9.0), (4, None)]


def test_a_fresh_start_forgets_the_old_metrics(make_state) -> None:
    callback, state = Jsonl(), make_state()
    callback.start(state)
    steps(callback, state, 1, 3)
    Jsonl().start(make_state())
    assert lines(state) == []


def test_other_ranks_write_nothing(make_state) -> None:
    callback, state = Jsonl(), make_state(rank=1)
    callback.start(state)
    steps(callback, state, 1, 1)
    callback.end(state, "finished")
    assert not (state.directory / "metrics.jsonl").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from sieve.train.callbacks.jsonl import Jsonl
callback = Jsonl()
state = SimpleNamespace(directory=Path(sys.argv[1]), rank=0, resumed_from=None)
callback.start(state)
for step in range(1, 101):
    callback.step(state, {"step": step, "train/loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_no_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


def test_a_full_disk_delays_lines_and_loses_none(make_state, monkeypatch, caplog):
    run, writer = make_state(), Jsonl()
    writer.start(run)
    path, original, full = run.directory / "metrics.jsonl", os.pwrite, []

    def pwrite(file: int, data: bytes, offset: int) -> int:
        if full and len(data) > 5:
            return original(file, data[:5], offset)  # a part, as a nearly full disk does
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    writer.step(run, {"step": 1, "a": 1.0})
    full.append(True)
    for step in (2, 3):
        writer.step(run, {"step": step, "a": 1.0})
    writer.evaluated(run, {"step": 3, "b": 2.0})
    assert [row["step"] for row in read_metrics(path)][:1] == [1]
    assert caplog.text.count("metrics.jsonl cannot be written: No space left on device") == 1
    full.clear()
    writer.step(run, {"step": 4, "a": 1.0})
    writer.end(run, "finished")
    assert read_metrics(path) == [
        {"step": 1, "a": 1.0}, {"step": 2, "a": 1.0}, {"step": 3, "a": 1.0, "b": 2.0}, {"step": 4, "a": 1.0},
    ]
    assert len(path.read_text().splitlines()) == 4
