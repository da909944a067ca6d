from __future__ import annotations

import math

import pytest

from sieve.train.schedule import ScheduleConfig, ratio


def values(total: int, **settings) -> list[float]:
    config = ScheduleConfig(**settings)
    return [ratio(config, step, total) for step in range(1, total + 1)]


def test_wsd_rises_stays_and_falls_to_the_floor():
    found = values(10, warmup=2, decay=4, min_ratio=0.2)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_with_a_square_root():
    found = values(4, warmup=0, decay=4, min_ratio=0, decay_shape="sqrt")
    assert found == pytest.approx([1 - math.sqrt(1 / 4), 1 - math.sqrt(2 / 4), 1 - math.sqrt(3 / 4), 0])


def test_cosine():
    found = values(6, type="cosine", warmup=2, min_ratio=0.1)
    expected = [0.5, 1] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3, 4)]
    assert found == pytest.approx(expected)


def test_shares_of_the_run_are_rounded_up_to_steps():
    assert values(50, warmup=0.05, decay=0.1, min_ratio=0)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert values(50, warmup=0.05, decay=0.1, min_ratio=0)[-6:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
def test_never_above_the_peak_and_at_the_floor_at_the_end(kind, total):
    found = values(total, type=kind, warmup=0.1, decay=0.5, min_ratio=0.1)
    assert all(0 < value <= 1 for value in found)
    assert found[-1] == pytest.approx(0.1 if total > 1 else 1.0)  # a run of one step is all warm-up
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1]) and found[peak:] == sorted(found[peak:], reverse=True)


def test_no_decay_and_no_warmup():
    assert values(3, warmup=0, decay=0) == [1, 1, 1]
