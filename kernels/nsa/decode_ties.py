"""Which choices of blocks hang by rounding.

The decode kernels split a sequence's compressed keys among programs, and so add a softmax's sum in another order than
training does. That moves an importance by a unit or two in its last place, and the choice only where the lightest block
chosen and the heaviest passed over are as near as that, or where a weight is as near to those that are flushed to zero.
`near` finds such choices, with room to spare, and `tied` those of them that are the same in any order. What is left is made
anew (decode_anew.py), by whichever programs attend to the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.nsa.decode_weigh import FORCED

# Ranks below that of 2 ** -95: of so small importances, weights about the smallest, 2 ** -126, are more than rounding. There
# are at most a few thousand of them in a block.
FAINT = tl.constexpr(32 << 23)


@triton.jit
def near(least, most, lse, edge, margin):
    """Whether the ranks (see weigh_and_merge) of the lightest block chosen and of the heaviest passed over (-1: none) may stand
    the other way round in training.

    lse: the heads' largest |lse| in powers of two. edge: how close any weight's exponent comes to where weights are flushed to
    zero. margin: what rounding may move in an importance at most, as a share of it and for each unit of what was rounded.
    """
    below_one = 127.0 - (least >> 23).to(tl.float32)  # the importance in powers of two
    reach = margin * (8.0 + lse + 0.5 * below_one)
    # Ranks differ by 2 ** 23 to 2 ** 24 units for a difference of the whole; of nothing nothing is left to rounding.
    close = (least > 0) & ((least - most).to(tl.float32) <= reach * 16777216.0)
    return (least < FORCED) & (most >= 0) & (close | _flushed(least, lse, edge, margin))


@triton.jit
def _flushed(least, lse, edge, margin):
    """Whether a weight may be flushed to zero here and not in training, or the reverse, and that may decide."""
    return (least < FAINT) & (edge <= margin * (136.0 + lse))


@triton.jit
def _only_slot(
    score_ptr, lse, block, seen, slots, GROUP: tl.constexpr, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    REACHED: tl.constexpr,
):  # fmt: skip
    """The slot that the block's importance is of, if all others together are nothing beside it in fp32; else -1. lse [ROWS]."""
    row = tl.arange(0, ROWS)
    place = tl.arange(0, REACHED)
    inside = place - (B - 1)  # the first B - 1 are of the block before
    slot = block * A + inside
    ok = (inside < A) & (slot >= 0) & (slot < seen)
    at = (row.to(tl.int64) * slots)[:, None] + slot[None, :]
    s = tl.load(score_ptr + at, mask=(row < GROUP)[:, None] & ok[None, :], other=float("-inf"))
    counted = tl.where(inside < 0, B + inside, tl.minimum(A - inside, B))
    part = tl.where(ok, tl.sum(tl.exp2(s - lse[:, None]), 0) * counted.to(tl.float32), 0.0)
    largest = tl.max(part, 0)
    only = tl.max(tl.where(part == largest, slot, -1), 0)
    others = tl.sum(tl.where(slot == only, 0.0, part), 0)
    # An eighth of what a sum in any order could round up to the next number.
    return tl.where((largest > 0.0) & (others <= largest * 2.0**-27), only, -1)


@triton.jit
def _candidates(
    rank_ptr, block_ptr, picked, place, current, COUNT: tl.constexpr, KEPT: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    """rank, block and whether it is chosen, of candidates; -1, -1, False past the last and in shares after the query."""
    ok = (place < COUNT) & (place // KEPT * SHARE <= current)
    rank = tl.load(rank_ptr + place, mask=ok, other=-1)
    block = tl.load(block_ptr + place, mask=ok, other=-1)
    chosen = tl.max((block[:, None] == picked[None, :]).to(tl.int32), 1) * ok.to(tl.int32)
    return rank, block, chosen != 0


@triton.jit
def tied(
    rank_ptr, block_ptr, rest_ptr, score_ptr, lse, edge, margin, picked, least, most, current, seen, slots,
    COUNT: tl.constexpr, KEPT: tl.constexpr, SHARE: tl.constexpr, SHARES_PADDED: tl.constexpr, MINE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, REACHED: tl.constexpr,
):  # fmt: skip
    """Whether a choice is near by nothing but one slot that lies across two blocks and is all there is in both, so that they
    weigh the same in any order of sums, and the lower one is chosen.

    lse [ROWS] of the heads, picked int32 [WIDTH] of `_pick`; the rest see there. Where attention is sharp, most that is near
    is so: a slot in l / l' of them counts for two blocks.
    """
    lower = -1
    upper = -1
    for first in tl.range(0, COUNT, MINE, num_stages=1):
        place = first + tl.arange(0, MINE)
        rank, block, chosen = _candidates(rank_ptr, block_ptr, picked, place, current, COUNT, KEPT, SHARE)
        lower = tl.maximum(lower, tl.max(tl.where(chosen & (rank == least), block, -1), 0))
        upper = tl.maximum(upper, tl.max(tl.where((chosen == 0) & (rank == most), block, -1), 0))
    next_least = FORCED
    share = tl.arange(0, SHARES_PADDED)
    rest = tl.load(rest_ptr + share, mask=share < COUNT // KEPT, other=-1)
    next_most = tl.max(tl.where(share * SHARE <= current, rest, -1), 0)
    for first in tl.range(0, COUNT, MINE, num_stages=1):
        place = first + tl.arange(0, MINE)
        rank, block, chosen = _candidates(rank_ptr, block_ptr, picked, place, current, COUNT, KEPT, SHARE)
        next_least = tl.minimum(next_least, tl.min(tl.where(chosen & (block != lower), rank, FORCED), 0))
        next_most = tl.maximum(next_most, tl.max(tl.where((chosen == 0) & (block != upper), rank, -1), 0))
    farthest = tl.max(tl.abs(lse), 0)
    alone = (near(next_least, most, farthest, edge, margin) == 0) & (near(least, next_most, farthest, edge, margin) == 0)
    mine = _only_slot(score_ptr, lse, lower, seen, slots, GROUP, ROWS, A, B, REACHED)
    theirs = _only_slot(score_ptr, lse, upper, seen, slots, GROUP, ROWS, A, B, REACHED)
    return alone & (least == most) & (mine >= 0) & (mine == theirs) & (_flushed(least, farthest, edge, margin) == 0)
