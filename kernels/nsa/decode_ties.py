"""Which choices of blocks hang by rounding.

The decode kernels split a sequence's compressed keys among programs, and so add a softmax's sum in another order than
training does. That moves an importance by a unit or two in its last place, and the choice only where the lightest block
chosen and the heaviest passed over are as near as that, or where a weight is as near to those that are flushed to zero.
`near` finds what may be such choices, with room to spare, and `settle` looks at them more closely; what is left is made anew
(decode_anew.py), by whichever programs attend to the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.nsa.compress_tiles import seen_of
from sieve.kernels.nsa.decode_anew import choose_as_training
from sieve.kernels.nsa.decode_weigh import FORCED

# Ranks below that of 2 ** -95: of so small importances, weights about the smallest, 2 ** -126, are more than rounding. There
# are at most a few thousand of them in a block.
FAINT = tl.constexpr(32 << 23)
FLUSHED = tl.constexpr(-126.0)  # exponents below it give weights of 0
SCANNED = tl.constexpr(64)  # scores of each head that are looked at together


@triton.jit
def near(least, most, lse, margin):
    """Whether the ranks (see weigh_and_merge) of the lightest block chosen and of the heaviest passed over (-1: none) may stand
    the other way round in training.

    lse: the heads' largest |lse| in powers of two. margin: what rounding may move in an importance at most, as a share of it
    and for each unit of what was rounded.
    """
    return (least < FORCED) & (most >= 0) & (_close(least, most, lse, margin) | (least < FAINT))


@triton.jit
def _close(least, most, lse, margin):
    below_one = 127.0 - (least >> 23).to(tl.float32)  # the importance in powers of two
    reach = margin * (8.0 + lse + 0.5 * below_one)
    # Ranks differ by 2 ** 23 to 2 ** 24 units for a difference of the whole; of nothing nothing is left to rounding.
    return (least > 0) & ((least - most).to(tl.float32) <= reach * 16777216.0)


@triton.jit
def _flushed(score_ptr, lse, seen, slots, margin, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Whether the exponent of any weight is as close to FLUSHED as rounding may move it. lse [ROWS]."""
    row = tl.arange(0, ROWS)
    nearest = float("inf")
    for first in range(0, seen, SCANNED):
        slot = first + tl.arange(0, SCANNED)
        mask = (row < GROUP)[:, None] & (slot < seen)[None, :]
        at = (row.to(tl.int64) * slots)[:, None] + slot[None, :]
        s = tl.load(score_ptr + at, mask=mask, other=float("inf"))
        nearest = tl.minimum(nearest, tl.min(tl.min(tl.abs(s - lse[:, None] - FLUSHED), 1), 0))
    return nearest <= margin * (136.0 + tl.max(tl.abs(lse), 0))


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
def _tied(
    rank_ptr, block_ptr, rest_ptr, score_ptr, lse, margin, picked, least, most, current, seen, slots,
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
    others = (next_least < FORCED) & _close(next_least, most, farthest, margin)
    others = others | ((next_most >= 0) & _close(least, next_most, farthest, margin))
    mine = _only_slot(score_ptr, lse, lower, seen, slots, GROUP, ROWS, A, B, REACHED)
    theirs = _only_slot(score_ptr, lse, upper, seen, slots, GROUP, ROWS, A, B, REACHED)
    return (others == 0) & (least == most) & (mine >= 0) & (mine == theirs)


@triton.jit(noinline=True)
def settle(
    q_ptr, k_ptr, score_ptr, lse_ptr, rank_ptr, block_ptr, rest_ptr, choice_ptr, scratch_ptr, first_head, least, most, at,
    slots, stride_n, width, factor, margin,
    D0: tl.constexpr, D1: tl.constexpr, COUNT: tl.constexpr, KEPT: tl.constexpr, SHARE: tl.constexpr,
    SHARES_PADDED: tl.constexpr, MINE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, REACHED: tl.constexpr,
    PADDED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr,
    LOCAL: tl.constexpr, TOPK: tl.constexpr, WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_CHUNK: tl.constexpr,
    A_PADDED: tl.constexpr, LSE_ROWS: tl.constexpr, LSE_SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
    SCORE_SLOTS: tl.constexpr,
):  # fmt: skip
    """Turn the choice at choice_ptr, int32 [WIDTH], whose ranks are `near`, into training's; whether it was made anew.

    Pointers are those of the pair, but q_ptr; see `select`. A function that is called, not copied into the kernel: between its
    other instructions, these would be loaded with them and cost microseconds where nothing is near.
    """
    row = tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < GROUP, other=0.0)
    picked = tl.load(choice_ptr + tl.arange(0, WIDTH))
    seen = tl.minimum(seen_of(at, KERNEL, STRIDE), slots)
    doubtful = _close(least, most, tl.max(tl.abs(lse), 0), margin)
    if doubtful:
        same = _tied(
            rank_ptr, block_ptr, rest_ptr, score_ptr, lse, margin, picked, least, most, at // BLOCK, seen, slots,
            COUNT, KEPT, SHARE, SHARES_PADDED, MINE, GROUP, ROWS, BLOCK // STRIDE, KERNEL // STRIDE, REACHED,
        )  # fmt: skip
        doubtful = same == 0
    if (doubtful == 0) & (least < FAINT):
        doubtful = _flushed(score_ptr, lse, seen, slots, margin, GROUP, ROWS)
    if doubtful:
        choose_as_training(
            q_ptr, k_ptr, scratch_ptr, choice_ptr, first_head, at, slots, stride_n, width, factor,
            GROUP, PADDED, D0, D1, KERNEL, STRIDE, BLOCK, INIT, LOCAL, TOPK, LOG_WIDTH, LOG_CHUNK, A_PADDED,
            LSE_ROWS, LSE_SLOTS, COLUMNS, SCORE_SLOTS,
        )  # fmt: skip
    return doubtful.to(tl.int32)
