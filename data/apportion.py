"""Whose turn it is: weights kept exactly, up to one row at every point of the run, with nothing drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def whole(weights: Sequence[Fraction]) -> list[int]:
    """The smallest integers in the ratio of `weights`, which are not negative and not all zero."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    numbers = [weight.numerator * (scale // weight.denominator) for weight in weights]
    common = math.gcd(*numbers)
    return [number // common for number in numbers]


def choose(weights: Sequence[int], given: Sequence[int], size: int) -> int:
    """Which of the weighted gets the next `size` tokens, when they have been given[i] so far.

    The earliest deadline among those that the next row would not put ahead of their share: pseudo-deadlines of
    proportionate fair scheduling (Baruah, Cohen, Plaxton and Varvel, Algorithmica 15, 1996), by which, with rows of one
    size, given[i] never differs from i's share by as much as a row. The largest deficit, which is simpler, lets small
    weights fall behind by several rows. All in integers, so that it is the same on every machine.
    """
    total, after = sum(weights), sum(given) + size
    best = -1
    for i, weight in enumerate(weights):
        if weight * after > given[i] * total:
            # given + size is the amount whose share's moment is the deadline: compare (given + size) / weight.
            if best < 0 or (given[i] + size) * weights[best] < (given[best] + size) * weight:
                best = i
    return best
