"""A shuffle of streams: a permutation within windows, resumed exactly from any item, any number of times."""

import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve.data.window_shuffle import WindowShuffle


def items_from(count):
    return lambda start: iter(range(start, count))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(1, 30), st.integers(0, 2**40), st.lists(st.integers(0, 40), max_size=4))
def test_stops_change_nothing(count, window, seed, stops):
    whole = list(WindowShuffle(items_from(count), window, seed))
    seen, state = [], None
    for stop in [*stops, count]:
        for item, after in islice(WindowShuffle(items_from(count), window, seed, state), stop):
            seen.append(item)
            state = json.loads(json.dumps(after))
    assert seen == [item for item, _ in whole]
    for start in range(0, count, window):
        block = seen[start : start + window]
        assert sorted(block) == list(range(start, start + len(block)))


def test_it_shuffles_and_the_seed_tells_how():
    first, again, other = ([i for i, _ in WindowShuffle(items_from(200), 100, seed)] for seed in (1, 1, 2))
    assert first == again != other and first != sorted(first)
    assert [i - 100 for i in first[100:]] != first[:100], "every window has a permutation of its own"


def test_going_on_reads_one_window_and_no_more():
    asked = []

    def recorded(start):
        asked.append(start)
        return iter(range(start, 10**9))

    state = {"start": 10**6, "given": 7, "window": 10, "seed": 3}
    item, after = next(iter(WindowShuffle(recorded, 10, 3, state)))
    assert asked == [10**6] and 10**6 <= item < 10**6 + 10 and after["given"] == 8
    assert len(json.dumps(after)) < 100


def test_other_settings_cannot_go_on():
    state = {"start": 0, "given": 1, "window": 10, "seed": 3}
    with pytest.raises(ValueError, match="window=10 as one with window=11"):
        WindowShuffle(items_from(3), 11, 3, state)
    with pytest.raises(ValueError, match="seed=3 as one with seed=4"):
        WindowShuffle(items_from(3), 10, 4, state)
    with pytest.raises(ValueError, match="window=0"):
        WindowShuffle(items_from(3), 0, 4)
