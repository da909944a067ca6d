from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sieve.train.signals import REPEAT, SaveRequest, Stopped, StopSignal

SCRIPT = """
import os, signal, sys
from sieve.train.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while stop.requested is None:
        signal.pause()
    print(stop.requested, flush=True)
    __import__("time").sleep(3)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_is_only_remembered(name, capfd):
    before = signal.getsignal(signal.Signals[name])
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested == name
    assert signal.getsignal(signal.Signals[name]) is before
    assert f"{name}: finishing this step and saving" in capfd.readouterr().err


def start(script: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("first", "second", "pause"), [("SIGINT", "SIGINT", REPEAT + 0.1), ("SIGTERM", "SIGINT", 0.0)])
def test_the_second_signal_ends_the_process(first, second, pause):
    process = start(SCRIPT)
    process.send_signal(signal.Signals[first])
    assert process.stdout.readline() == f"{first}\n"
    time.sleep(pause)
    process.send_signal(signal.Signals[second])
    assert process.wait(20) == 128 + signal.Signals[second]
    assert "ending at once" in process.communicate()[1]


def test_a_signal_that_comes_twice_at_once_is_one():
    process = start(SCRIPT)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(20) == 0
    assert "ending at once" not in process.communicate()[1]


def test_the_second_signal_ends_a_process_whose_main_thread_hangs_in_c():
    """Python's handlers do not run there: a lock that is never released stands for a collective of a dead rank."""
    hang = "import ctypes; ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))"
    process = start(SCRIPT.replace("while stop", f"{hang}\n    while stop"))
    process.send_signal(signal.SIGTERM)
    assert "finishing this step" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT


def test_before_there_is_anything_to_save_a_signal_is_raised():
    with StopSignal() as stop:
        with pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert stop.requested == "SIGTERM"
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("what was asked for before is not forgotten")


def test_a_forked_childs_signals_are_not_the_parents():
    with StopSignal() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(0.3)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.1)
        assert stop.requested is None


def test_touching_a_file_asks_for_a_save(tmp_path):
    request = SaveRequest(tmp_path / "save")
    assert not request.take()
    (tmp_path / "save").touch()
    until = time.monotonic() + 5
    while not request.take():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not (tmp_path / "save").exists() and not request.take()


def test_who_does_not_come_to_an_end_is_told_of_once():
    told = []
    with StopSignal(0.3, lambda: told.append(time.monotonic())) as stop:
        time.sleep(0.5)
        assert not told, "the time runs from the signal on"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.8)
        assert len(told) == 1 and 0.25 < told[0] - stop.since < 0.7
    with StopSignal(5.0, lambda: told.append(0.0)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(told) == 1


# Signals its own group, as a terminal does, while children of it run, and says how those ended.
GROUP = """
import contextlib, os, signal, subprocess, sys, threading, time
from sieve.train.signals import StopSignal
with StopSignal() as stop:
    with stop.shielded() if sys.argv[1] == "shielded" else contextlib.nullcontext():
        children = [subprocess.Popen(["sleep", "1"])]
        thread = threading.Thread(target=lambda: children.append(subprocess.Popen(["sleep", "1"])))
        thread.start()
        thread.join()
        os.killpg(0, getattr(signal, sys.argv[2]))
        print([child.wait() for child in children], stop.requested)
    after = subprocess.Popen(["sleep", "60"])
    after.terminate()
    print(after.wait())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("mode", ["shielded", "bare"])
def test_a_signal_to_the_group_spares_the_compilers_of_a_step(mode, name):
    done = subprocess.run(
        [sys.executable, "-c", GROUP, mode, name], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    code = 0 if mode == "shielded" else -signal.Signals[name]
    assert done.stdout.splitlines() == [f"{[code, code]} {name}", str(-signal.SIGTERM)], done.stderr
