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
    __import__("time").sleep(float(sys.argv[1]))
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


def start(script: str, lasting: float = 3.0) -> subprocess.Popen:
    """lasting: seconds that the process goes on after the first signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(lasting)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    process = start(SCRIPT, lasting=1.2)
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


# A step that Inductor compiles; the group is signalled as soon as g++ runs, wherever Inductor starts it.
COMPILED = """
import contextlib, os, signal, sys, threading, time
from pathlib import Path
import torch
from sieve.train.signals import StopSignal
torch._inductor.config.compile_threads = int(sys.argv[3])

def runs_gcc():
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().rpartition(")")[::2]
        except OSError:
            continue
        if "cc1plus" in name and os.getpgid(int(path.parent.name)) == os.getpgid(0):
            return True

def interrupt():
    while not runs_gcc():
        time.sleep(0.002)
    os.killpg(0, getattr(signal, sys.argv[2]))

@torch.compile
def step(x):
    return (x.sin() * x.exp()).sum(0).softmax(0)

x = torch.rand(64, 300, requires_grad=True)
with StopSignal() as stop, stop.shielded() if sys.argv[1] == "shielded" else contextlib.nullcontext():
    torch.compile(lambda y: y.cos() + 1)(torch.rand(9))  # Inductor tries out what g++ can do first
    threading.Thread(target=interrupt, daemon=True).start()
    out = step(x)
    out[3].backward()
    time.sleep(0.1)
    print(stop.requested, torch.allclose(out, (x.sin() * x.exp()).sum(0).softmax(0), rtol=1e-3), x.grad.isfinite().all().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("mode", "name"), [("shielded", "SIGINT"), ("shielded", "SIGTERM"), ("bare", "SIGTERM")])
def test_a_signal_to_the_group_while_a_step_is_compiled(mode, name, threads, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, mode, name, str(threads)], capture_output=True, text=True, timeout=300,
        start_new_session=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    if mode == "shielded":
        assert done.returncode == 0 and done.stdout == f"{name} True True\n", done.stderr[-3000:]
    else:
        assert done.returncode != 0 and "True True" not in done.stdout, "what the shield is for does not happen"
