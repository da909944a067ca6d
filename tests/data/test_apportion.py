"""Shares hold to within a row at every point, for any weights."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve.data.apportion import choose, whole


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), st.integers(1, 5000))
def test_no_share_is_ever_a_row_off(weights, size):
    given_, total = [0] * len(weights), sum(weights)
    for row in range(1, 400):
        given_[choose(weights, given_, size)] += size
        for weight, got in zip(weights, given_):
            assert abs(got - Fraction(weight * row * size, total)) < size
    assert all(got == 0 for weight, got in zip(weights, given_) if weight == 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=6), st.lists(st.integers(1, 64), min_size=200, max_size=200),
)
def test_rows_with_padding_are_apportioned_by_their_tokens(weights, tokens):
    given_, total = [0] * len(weights), sum(weights)
    for row in tokens:
        given_[choose(weights, given_, 64)] += row
        for weight, got in zip(weights, given_):
            assert got - weight * sum(given_) / total <= 64
            assert weight * sum(given_) / total - got <= 64 * (len(weights) - 1)


def test_many_small_weights_do_not_wait_for_the_large():
    # The largest deficit would let some of these fall behind by more than a row.
    weights, given_ = [60, *range(1, 12)], [0] * 12
    for row in range(1, 1000):
        given_[choose(weights, given_, 1)] += 1
        assert max(abs(g - w * row / sum(weights)) for w, g in zip(weights, given_)) < 1


@pytest.mark.parametrize("weights, expected", [
    ([Fraction("0.7"), Fraction("0.3")], [7, 3]), ([Fraction(1), Fraction(0)], [1, 0]),
    ([Fraction(1, 3), Fraction(1, 6), Fraction(1, 2)], [2, 1, 3]),
])
def test_whole_numbers_in_the_same_ratio(weights, expected):
    assert whole(weights) == expected
