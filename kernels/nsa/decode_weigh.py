"""Equation 9 of one new token a sequence, and of every share of the blocks its heaviest; beside it, two branches merged.

The n heaviest blocks of all are among the n heaviest of each share, so the kernel that attends to them has few left to
choose from. Among at most a few hundred, a block's place is how many come before it, all counted at once: next to no step
waits for another, where a sorting network of 2048 has some fifty that do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.common.launch import after_earlier
from sieve.kernels.common.split_keys import heads_of
from sieve.kernels.nsa.decode_compress import split_of

FORCED = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ahead_of(theirs, their_place, rank, place):
    """int32 [N]: how many of `theirs` [M] come before each of `rank` [N]: the larger, of equals those in lower places."""
    larger = theirs[:, None] > rank[None, :]
    equal = (theirs[:, None] == rank[None, :]) & (their_place[:, None] < place[None, :])
    return tl.sum((larger | equal).to(tl.int32), 0)


@triton.jit
def _importance(
    score_ptr, stat_ptr, lse_ptr, first_head, first_block, seen, slots,
    GROUP: tl.constexpr, A: tl.constexpr, A_PADDED: tl.constexpr, B: tl.constexpr, B_PADDED: tl.constexpr,
    SHARE: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, windowing,
):  # fmt: skip
    """fp32 [SHARE] of blocks from first_block on: the weights of a block's own A slots, and of B - 1 of the block before.
    The heads' lse, [GROUP] in powers of two, are stored."""
    inside = tl.arange(0, SHARE * A_PADDED) % A_PADDED
    slot = (first_block + tl.arange(0, SHARE * A_PADDED) // A_PADDED) * A + inside
    live = (inside < A) & (slot < seen)
    edge_slot = first_block * A - (B - 1) + tl.arange(0, B_PADDED)  # of the block before the share
    edge_live = (tl.arange(0, B_PADDED) < B - 1) & (edge_slot >= 0) & (edge_slot < seen)
    weight = tl.zeros([SHARE * A_PADDED], tl.float32)
    edge_weight = tl.zeros([B_PADDED], tl.float32)
    part = tl.arange(0, PADDED)[None, :]
    # What lies past `seen` is read and dropped: a mask that may end anywhere would make wide loads narrow ones.
    for first in tl.range(0, GROUP, STEP, num_stages=1):
        head = first + tl.arange(0, STEP)
        ok = (head < GROUP)[:, None]
        s_at = score_ptr + ((first_head + head).to(tl.int64) * slots)[:, None]
        s = tl.load(s_at + slot[None, :], mask=ok & (slot < slots)[None, :], other=float("-inf"))
        s = tl.where(live[None, :], s, float("-inf"))
        edge = tl.load(s_at + edge_slot[None, :], mask=ok & edge_live[None, :], other=float("-inf"))
        at = stat_ptr + 2 * ((first_head + head).to(tl.int64)[:, None] * (PARTS + 1) + part)
        top = tl.load(at, mask=ok & (part < PARTS), other=float("-inf"))
        total = tl.load(at + 1, mask=ok & (part < PARTS), other=0.0)
        top = tl.where(part <= windowing, top, float("-inf"))  # past it lies the window's
        total = tl.where(part <= windowing, total, 0.0)
        highest = tl.max(top, 1)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(total * tl.exp2(top - shift[:, None]), 1)
        lse = tl.where(total > 0.0, shift + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
        tl.store(lse_ptr + head, lse, mask=(head < GROUP) & (first_block == 0))
        weight += tl.sum(tl.exp2(s - lse[:, None]), 0)
        edge_weight += tl.sum(tl.exp2(edge - lse[:, None]), 0)
    counted = tl.where(inside < A, tl.minimum(A - inside, B), 0).to(tl.float32)
    found = tl.sum(tl.reshape(weight * counted, [SHARE, A_PADDED]), 1)
    if B > 1:  # slot A - B + 1 + m of a block counts m + 1 times for the next one
        m = tl.arange(0, SHARE * B_PADDED) % B_PADDED
        block = tl.arange(0, SHARE * B_PADDED) // B_PADDED
        before = tl.gather(weight, tl.maximum(block - 1, 0) * A_PADDED + A - B + 1 + tl.minimum(m, B - 2), 0)
        before = tl.where((block > 0) & (m < B - 1), before * (m + 1).to(tl.float32), 0.0)
        found += tl.sum(tl.reshape(before, [SHARE, B_PADDED]), 1)
        edge_sum = tl.sum(edge_weight * (tl.arange(0, B_PADDED) + 1).to(tl.float32), 0)
        found += tl.where(tl.arange(0, SHARE) == 0, edge_sum, 0.0)
    return found


@triton.jit
def _shares(top, total, mine):
    """fp32 [HEADS, parts]: what each part's sum of values counts for in a branch's output, 0 where not `mine`."""
    top = tl.where(mine, top, float("-inf"))
    highest = tl.max(top, 1)
    scale = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    weight = tl.sum(tl.where(mine, total, 0.0) * scale, 1)
    return scale / tl.where(weight > 0.0, weight, 1.0)[:, None]


@triton.jit
def _mix(
    query_ptr, o_ptr, stat_ptr, gate_ptr, mix_ptr, program, heads, slots, EACH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compression and window attention, weighed by their gates, of HEADS of the B * H heads, EACH a sequence."""
    head, ok = heads_of(program, heads, HEADS)
    at = tl.load(query_ptr + head // EACH)
    _, _, _, windowing = split_of(at, slots, PARTS, KERNEL, STRIDE, WINDOW, KEYS)
    part = tl.arange(0, PADDED)[None, :]
    column = tl.arange(0, WIDE)[None, :]
    written = head.to(tl.int64)[:, None] * (PARTS + 1) + part
    top = tl.load(stat_ptr + 2 * written, mask=part <= PARTS, other=float("-inf"))
    total = tl.load(stat_ptr + 2 * written + 1, mask=part <= PARTS, other=0.0)
    o_at = o_ptr + (written * DIM)[:, :, None] + column[:, None]
    o = tl.load(o_at, mask=(part <= PARTS)[:, :, None] & (column < DIM)[:, None], other=0.0)
    compressed = part <= windowing[:, None]
    share = tl.load(gate_ptr + head * 3).to(tl.float32)[:, None] * _shares(top, total, compressed)
    share += tl.load(gate_ptr + head * 3 + 2).to(tl.float32)[:, None] * _shares(top, total, part > windowing[:, None])
    mix_at = mix_ptr + (head.to(tl.int64) * DIM)[:, None] + column
    tl.store(mix_at, tl.sum(o * share[:, :, None], 1), mask=ok[:, None] & (column < DIM))


@triton.jit(do_not_specialize=["pairs"])
def weigh_and_merge(
    query_ptr, score_ptr, o_ptr, stat_ptr, gate_ptr, rank_ptr, block_ptr, rest_ptr, lse_ptr, mix_ptr, slots, pairs,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, A_PADDED: tl.constexpr, B_PADDED: tl.constexpr,
    SHARE: tl.constexpr, CHUNK: tl.constexpr, SHARES: tl.constexpr, KEPT: tl.constexpr, STEP: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, ALL_PADDED: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (pairs * SHARES + pairs * GROUP / HEADS), pairs being B * Hkv.

    rank, block int32 [pairs, SHARES, KEPT]: the KEPT heaviest blocks of each share of SHARE in ascending order, and what
    they are chosen by: importance, whose bits order as it does since it is not negative, the largest number where forced,
    -1 in the query's future. rest int32 [pairs, SHARES]: the largest rank of those not kept, -1 if there is none. lse fp32
    [pairs, GROUP]: in powers of two. All are written only where the query has blocks to choose from and is past the share's
    first.
    mix fp32 [B * H, DIM]: compression and window attention, weighed by their gates.
    """
    program = tl.program_id(0)
    after_earlier(OVERLAP)
    if program < pairs * SHARES:
        pair = program // SHARES
        at = tl.load(query_ptr + pair // HEADS_KV)
        current = at // BLOCK
        first = program % SHARES * SHARE
        if (current >= TOPK) & (first <= current):
            block = first + tl.arange(0, SHARE)
            seen, _, _, windowing = split_of(at, slots, PARTS, KERNEL, STRIDE, WINDOW, KEYS)
            importance = _importance(
                score_ptr, stat_ptr, lse_ptr + pair * GROUP, pair * GROUP, first, seen, slots, GROUP, BLOCK // STRIDE, A_PADDED,
                KERNEL // STRIDE, B_PADDED, SHARE, STEP, PARTS, PADDED, windowing,
            )  # fmt: skip
            forced = (block < INIT) | (block > current - LOCAL)
            rank = tl.where(forced, FORCED, importance.to(tl.int32, bitcast=True))
            rank = tl.where(block <= current, rank, -1)
            # Gathered, since tensors as `_importance` leaves them would be compared with a row in each thread: few rows
            # a thread, and few at a time, are what its registers hold.
            local = tl.arange(0, SHARE)
            mine = tl.gather(rank, local, 0)
            ahead = tl.zeros([SHARE], tl.int32)
            for begin in tl.static_range(0, SHARE, CHUNK):
                other = begin + tl.arange(0, CHUNK)
                ahead += ahead_of(tl.gather(rank, other, 0), other, mine, local)
            kept = ahead < KEPT
            place = program.to(tl.int64) * KEPT + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(rank_ptr + place, mine, mask=kept)
            tl.store(block_ptr + place, first + local, mask=kept)
            tl.store(rest_ptr + program, tl.max(tl.where(kept, -1, mine), 0))
    else:
        _mix(
            query_ptr, o_ptr, stat_ptr, gate_ptr, mix_ptr, program - pairs * SHARES, pairs * GROUP, slots, HEADS_KV * GROUP,
            KERNEL, STRIDE, WINDOW, KEYS, PARTS, ALL_PADDED, DIM, WIDE, HEADS,
        )  # fmt: skip
