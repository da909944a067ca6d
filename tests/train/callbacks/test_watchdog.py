"""The watchdog in processes of their own, which it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sieve.train.callbacks.watchdog import Watchdog, WatchdogConfig, record_nccl

SCRIPT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from sieve.train.callbacks import watchdog
from sieve.train.callbacks.watchdog import Watchdog, WatchdogConfig
watchdog._GRACE = 0.5
run = SimpleNamespace(directory=Path(sys.argv[1]), rank=3)
dog = Watchdog(WatchdogConfig(**eval(sys.argv[2])))
dog.start(run)
def deep_in_the_step():
    exec(sys.argv[3])
for _ in range(8):
    time.sleep(0.1)
    dog.step(run, None)
deep_in_the_step()
dog.end(run, "finished")
"""
HELD = "import ctypes; ctypes.PyDLL(None).sleep(60)"  # in C, with the interpreter's lock in its hand


def outcome(tmp_path: Path, config: dict, ends: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), repr(config), ends]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("config", "ends", "why"), [
    ({"seconds": 0.5}, "time.sleep(60)", "no step for 0.5 s (watchdog.seconds)"),
    ({"seconds": 30}, "watchdog.end_late(Path(sys.argv[1]), 3, 0.5)", "not ended 0.5 s after a signal (watchdog.stop_seconds)"),
    ({"seconds": 1.5}, HELD, None),
])
def test_a_hang_is_dumped_and_ended(tmp_path, config, ends, why):
    done = outcome(tmp_path, config, ends)
    stacks = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    assert done.returncode == 1 and "in deep_in_the_step" in stacks
    assert why is None or f"rank 3: {why}" in done.stderr and why in stacks


def test_steps_that_come_are_no_hang_and_leave_nothing(tmp_path):
    done = outcome(tmp_path, {"seconds": 0.5}, "pass")
    assert done.returncode == 0 and list((tmp_path / "stacks").iterdir()) == []
    done = outcome(tmp_path / "off", {"seconds": 0}, "time.sleep(1)")
    assert done.returncode == 0 and not (tmp_path / "off").exists()


def test_a_slow_save_and_an_evaluation_are_signs_of_life(make_state):
    dog, run = Watchdog(WatchdogConfig(seconds=100)), make_state()
    dog.start(run)
    for sign in (lambda: dog.waiting(run), lambda: dog.evaluated(run, {}), lambda: dog.saved(run, None)):
        dog._beat = 0.0
        sign()
        assert dog._beat > 0
    dog.end(run, "finished")


def test_nccl_writes_into_the_runs_folder_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    record_nccl(tmp_path)
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/stacks/nccl-"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
