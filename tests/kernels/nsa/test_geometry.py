"""The sparse pattern's shape: which sizes are legal, and equation 9's weights."""

import pytest

from sieve.kernels.nsa.geometry import Geometry

LEGAL = dict(kernel_size=32, kernel_stride=16, block_size=64, topk=16, init_blocks=1, local_blocks=2, window_size=512)


def test_the_papers_weights():
    assert Geometry(**LEGAL).overlap == (1, 2, 2, 2, 1)


SIZES = [(32, 16, 64), (4, 4, 4), (12, 4, 12), (16, 4, 32), (8, 4, 64), (8, 8, 64), (24, 4, 32)]


@pytest.mark.parametrize("l, d, lp", SIZES)
def test_weights_are_equation_nines_double_sum_and_the_tokens_in_common(l, d, lp):
    weights = Geometry(**(LEGAL | dict(kernel_size=l, kernel_stride=d, block_size=lp))).overlap
    block = 7  # far from the start
    summed, common = {}, {}
    for m in range(lp // d):
        for n in range(l // d):
            i = lp // d * block + m + n - (l // d - 1)
            summed[i] = summed.get(i, 0) + 1
    tokens = set(range(block * lp, (block + 1) * lp))
    for i in range(block * lp * 3 // d):
        if shared := len(tokens & set(range(i * d, i * d + l))):
            common[i] = shared / d
    first = lp // d * block - (l // d - 1)
    assert {first + m: w for m, w in enumerate(weights)} == summed == common


@pytest.mark.parametrize("change, message", [
    ({"kernel_stride": 24}, "kernel_stride=24 must divide kernel_size=32"),
    ({"kernel_size": 48, "kernel_stride": 24}, "kernel_stride=24 must divide block_size=64"),
    ({"kernel_size": 128}, "kernel_size=128 must be at most block_size=64"),
    ({"topk": 2}, "topk=2 must be at least init_blocks"),
    ({"window_size": 0}, "window_size=0 must be at least 1"),
    ({"init_blocks": -1}, "init_blocks=-1 must be at least 0"),
    ({"local_blocks": 0}, "local_blocks=0 must be at least 1"),
])
def test_illegal_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**(LEGAL | change))


def test_no_initial_block_is_legal():
    assert Geometry(**(LEGAL | {"init_blocks": 0, "topk": 2})).topk == 2
