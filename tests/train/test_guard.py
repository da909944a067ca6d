from __future__ import annotations

import json
import math
import random

from sieve.train.guard import Guard, GuardConfig

NAN = float("nan")


def test_a_run_gives_up_after_so_many_in_a_row():
    guard = Guard(GuardConfig(max_in_a_row=3))
    for _ in range(2):
        for _ in range(2):
            assert guard.judge(NAN, 1.0, True) == "loss" and not guard.gives_up
        assert guard.judge(2.0, 1.0, False) is None
    assert [guard.judge(2.0, math.inf, True) for _ in range(3)] == ["gradient"] * 3
    assert guard.gives_up and guard.state["skipped"] == 7


def test_spikes_are_told_from_noise_and_only_on_request():
    generator = random.Random(0)
    guard, off = Guard(GuardConfig(spikes=True)), Guard(GuardConfig())
    for step in range(300):
        loss = generator.gauss(3.0, 0.05)
        assert guard.limit() == math.inf if step < 128 else loss < guard.limit() < 3.5, step
        guard.judge(loss, 1.0, False)
        off.judge(loss, 1.0, False)
    assert off.limit() == math.inf
    before = guard.limit()
    assert guard.judge(9.0, 1.0, True) == "spike" and guard.limit() == before, "a spike is no part of the window"
    assert guard.state["spikes"] == 1 and not guard.gives_up


def test_a_new_level_is_no_spike_for_ever():
    guard = Guard(GuardConfig(spikes=True, spike_window=8, max_in_a_row=4))
    for _ in range(8):
        guard.judge(2.0, 1.0, False)
    assert [guard.judge(5.0, 1.0, True) for _ in range(4)] == ["spike"] * 4
    assert guard.limit() == math.inf and not guard.gives_up


def test_its_state_goes_through_json():
    config = GuardConfig(spikes=True, spike_window=8)
    guard, generator = Guard(config), random.Random(0)
    for _ in range(20):
        guard.judge(generator.gauss(3, 0.1), 1.0, False)
    again = Guard(config, json.loads(json.dumps(guard.state)))
    assert again.limit() == guard.limit() and again.state == guard.state
