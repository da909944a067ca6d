from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sieve.train.signals import StopSignal

SCRIPT = """
import os, signal, sys
from sieve.train.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while stop.requested is None:
        signal.pause()
    print(stop.requested, flush=True)
    signal.pause()
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


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT")])
def test_the_second_signal_ends_the_process(first, second):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[first])
    assert process.stdout.readline() == f"{first}\n"
    process.send_signal(signal.Signals[second])
    assert process.wait(20) == 128 + signal.Signals[second]
    assert "ending at once" in process.communicate()[1]
