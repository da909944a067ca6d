"""The order is a permutation for every count, differs between epochs and seeds, looks random and never changes."""

from collections import Counter

import pytest

from sieve.data.shuffle import DocumentOrder

GOLDEN = [[6, 3, 9, 8, 4, 1, 0, 7, 2, 5], [4, 0, 7, 6, 5, 9, 3, 1, 2, 8]]


def order(n, seed=0, epoch=0):
    of = DocumentOrder(n, seed)
    return [of.at(epoch, i) for i in range(n)]


@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_every_small_count_is_permuted(seed):
    for n in range(1, 130):
        for epoch in (0, 1, 7):
            assert sorted(order(n, seed, epoch)) == list(range(n))


def test_pure_function_of_seed_epoch_and_count():
    of = DocumentOrder(50, 3)
    forward = [(e, i, of.at(e, i)) for e in range(3) for i in range(50)]
    assert all(DocumentOrder(50, 3).at(e, i) == at for e, i, at in reversed(forward))


def test_epochs_and_seeds_differ():
    orders = {tuple(order(40, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert tuple(range(40)) not in orders


def test_stays_as_it_is():
    # A changed order would silently change every run that is resumed or compared.
    assert order(10, seed=1234, epoch=0) == GOLDEN[0]
    assert order(10, seed=1234, epoch=1) == GOLDEN[1]


@pytest.mark.parametrize("n", [2, 5, 6])
def test_no_document_is_favoured(n):
    draws = 3000
    for position in (0, n - 1):
        counts = Counter(DocumentOrder(n, seed).at(0, position) for seed in range(draws))
        chi_square = sum((counts[i] - draws / n) ** 2 / (draws / n) for i in range(n))
        assert chi_square < 30  # p < 1e-5 for 5 degrees of freedom


def test_neighbours_scatter():
    found = order(1000)
    steps = [abs(a - b) for a, b in zip(found, found[1:])]
    assert 280 < sum(steps) / len(steps) < 390  # a third of n in expectation
    assert sum(step == 1 for step in steps) < 12


def test_large_counts_need_no_memory():
    of = DocumentOrder(10**12 + 7, 0)
    found = {of.at(0, i) for i in range(200)}
    assert len(found) == 200 and max(found) > 10**11 and max(found) < of.n


def test_outside_is_an_error():
    with pytest.raises(IndexError, match="position 5"):
        DocumentOrder(5, 0).at(0, 5)
    with pytest.raises(ValueError, match="n=0"):
        DocumentOrder(0, 0)
