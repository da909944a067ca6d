"""The top-n of one new token a sequence from the heaviest blocks of every share, and attention to the chosen ones.

All programs of a pair pick the same blocks, which spares a launch, and attend to a part of them each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.common.launch import after_earlier
from sieve.kernels.common.split_keys import (
    empty_sum,
    fold,
    heads_of,
    load_query,
    merged,
    pair_of,
    part_range,
    store_part,
)
from sieve.kernels.nsa.decode_ties import near, settle
from sieve.kernels.nsa.decode_weigh import FORCED, ahead_of


@triton.jit
def _rank(rank_ptr, place, current, COUNT: tl.constexpr, KEPT: tl.constexpr, SHARE: tl.constexpr):
    """What candidates are chosen by: -1 in shares that begin after the query, where nothing was written."""
    rank = tl.load(rank_ptr + place, mask=place < COUNT, other=-1)  # not masked by `current`, which it would wait for
    return tl.where(place // KEPT * SHARE <= current, rank, -1)


@triton.jit
def _pick(
    rank_ptr, block_ptr, rest_ptr, current, COUNT: tl.constexpr, KEPT: tl.constexpr, SHARE: tl.constexpr,
    TOPK: tl.constexpr, WIDTH: tl.constexpr, MINE: tl.constexpr, THEIRS: tl.constexpr, SHARES_PADDED: tl.constexpr,
):  # fmt: skip
    """int32 [WIDTH]: the TOPK blocks of largest rank, of equals the lower block, ascending, then -1; the smallest rank of
    those, and the largest of all others, -1 if there are none.

    rank, block [COUNT]: KEPT blocks of each share, ascending, so that places order as blocks do; MINE of them are
    compared with THEIRS at a time. rest [COUNT / KEPT]: the largest rank in each share that it does not keep. A query with no
    more blocks than it may choose takes them all, whatever lies there.
    """
    share = tl.arange(0, SHARES_PADDED)
    rest = tl.load(rest_ptr + share, mask=share < COUNT // KEPT, other=-1)
    most = tl.max(tl.where(share * SHARE <= current, rest, -1), 0)
    least = FORCED
    order = tl.arange(0, WIDTH)
    picked = tl.zeros([WIDTH], tl.int32)
    before = 0
    for first in tl.range(0, COUNT, MINE, num_stages=1):
        place = first + tl.arange(0, MINE)
        rank = _rank(rank_ptr, place, current, COUNT, KEPT, SHARE)
        block = tl.load(block_ptr + place, mask=place < COUNT, other=-1)
        ahead = tl.zeros([MINE], tl.int32)
        for other in tl.range(0, COUNT, THEIRS, num_stages=1):
            their_place = other + tl.arange(0, THEIRS)
            ahead += ahead_of(_rank(rank_ptr, their_place, current, COUNT, KEPT, SHARE), their_place, rank, place)
        chosen = ((ahead < TOPK) & (place < COUNT)).to(tl.int32)
        least = tl.minimum(least, tl.min(tl.where(chosen > 0, rank, FORCED), 0))
        most = tl.maximum(most, tl.max(tl.where((ahead >= TOPK) & (place < COUNT), rank, -1), 0))
        position = before + tl.cumsum(chosen, 0) - chosen
        here = (chosen > 0)[:, None] & (position[:, None] == order[None, :])
        picked += tl.sum(tl.where(here, block[:, None], 0), 0)
        before += tl.sum(chosen, 0)
    picked = tl.where(current < TOPK, order, picked)
    return tl.where((order < TOPK) & (order <= current), picked, -1), least, most


@triton.jit
def select(
    q_ptr, k_ptr, v_ptr, k_cmp_ptr, query_ptr, score_ptr, rank_ptr, block_ptr, rest_ptr, lse_ptr, choice_ptr, scratch_ptr,
    index_ptr, near_ptr, o_ptr, stat_ptr, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    k_cmp_b, k_cmp_h, k_cmp_n, slots, factor, margin,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, WIDTH: tl.constexpr, SHARE: tl.constexpr, KEPT: tl.constexpr, COUNT: tl.constexpr,
    MINE: tl.constexpr, THEIRS: tl.constexpr, SHARES_PADDED: tl.constexpr, SLC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, REACHED: tl.constexpr, PADDED: tl.constexpr, A_PADDED: tl.constexpr,
    ROW: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_CHUNK: tl.constexpr, LSE_ROWS: tl.constexpr, LSE_SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr, SCORE_SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, SLC). rank, block, rest, lse: see weigh_and_merge. index int32 [B * Hkv, TOPK]: the choice. near int32
    [B * Hkv]: whether it hung by rounding, so that `settle` made it anew; choice int32 [B * Hkv * SLC, WIDTH] and scratch fp32
    [B * Hkv * SLC, ROW]: what each program needs for that."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch, kv_head = pair_of(pair, HEADS_KV)
    after_earlier(OVERLAP)
    at = tl.load(query_ptr + batch)
    q0, q1 = load_query(q_ptr, pair * GROUP, GROUP, D0, D1, ROWS)
    current = at // BLOCK
    rank_ptr += pair.to(tl.int64) * COUNT
    block_ptr += pair.to(tl.int64) * COUNT
    rest_ptr += pair * (COUNT // KEPT)
    order = tl.arange(0, WIDTH)
    head = tl.arange(0, ROWS)
    lse_ptr += pair * GROUP
    lse = tl.load(lse_ptr + head, mask=head < GROUP, other=0.0)
    picked, least, most = _pick(
        rank_ptr, block_ptr, rest_ptr, current, COUNT, KEPT, SHARE, TOPK, WIDTH, MINE, THEIRS, SHARES_PADDED
    )
    anew = 0
    farthest = tl.max(tl.where(current >= TOPK, tl.abs(lse), 0.0), 0)  # nothing was written if it may take all blocks
    if (current >= TOPK) & near(least, most, farthest, margin):
        choice_ptr = choice_ptr + (pair * SLC + part).to(tl.int64) * WIDTH
        tl.store(choice_ptr + order, picked)
        tl.debug_barrier()  # what one thread wrote others read
        anew = settle(
            q_ptr, k_cmp_ptr + batch * k_cmp_b + kv_head * k_cmp_h, score_ptr + pair.to(tl.int64) * GROUP * slots, lse_ptr,
            rank_ptr, block_ptr, rest_ptr, choice_ptr, scratch_ptr + (pair * SLC + part).to(tl.int64) * ROW, pair * GROUP,
            least, most, at, slots, k_cmp_n, (ROW - GROUP) // 2, factor, margin,
            D0, D1, COUNT, KEPT, SHARE, SHARES_PADDED, MINE, GROUP, ROWS, REACHED, PADDED, KERNEL, STRIDE, BLOCK, INIT, LOCAL,
            TOPK, WIDTH, LOG_WIDTH, LOG_CHUNK, A_PADDED, LSE_ROWS, LSE_SLOTS, COLUMNS, SCORE_SLOTS,
        )  # fmt: skip
        tl.debug_barrier()
        picked = tl.load(choice_ptr + order)
    tl.store(near_ptr + pair, anew, mask=part == 0)
    tl.store(index_ptr + pair * TOPK + order, picked, mask=(order < TOPK) & (part == 0))
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    begin, end = part_range(tl.minimum(current + 1, TOPK) * BLOCK, part, SLC, KEYS)
    acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        # From registers, so that the loads of several tiles can be under way.
        if BLOCK % KEYS == 0:
            chosen = tl.sum(tl.where(order == first // BLOCK, picked, 0), 0)
        else:
            chosen = tl.sum(tl.where(order[:, None] == (key // BLOCK)[None, :], picked[:, None], 0), 0)
        token = chosen * BLOCK + key % BLOCK
        visible = (key < end) & (chosen >= 0) & (token <= at)
        row = token.to(tl.int64)
        acc0, acc1, top, total, _ = fold(
            acc0, acc1, top, total, q0, q1, k_ptr + row * stride_kn, v_ptr + row * stride_vn, visible, factor,
            D0, D1, E0, E1,
        )  # fmt: skip
    store_part(o_ptr, stat_ptr, pair * GROUP, part, SLC, acc0, acc1, top, total, GROUP, E0, E1, ROWS)


@triton.jit(do_not_specialize=["heads"])
def finish(
    o_ptr, stat_ptr, gate_ptr, mix_ptr, out_ptr, heads, SLC: tl.constexpr, SLC_PADDED: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (heads / HEADS) of B * H heads: out = mix + the gate times the selected blocks' attention."""
    head, ok = heads_of(tl.program_id(0), heads, HEADS)
    column = tl.arange(0, WIDE)[None, :]
    at = (head.to(tl.int64) * DIM)[:, None] + column
    mask = ok[:, None] & (column < DIM)
    after_earlier(OVERLAP)
    gate = tl.load(gate_ptr + head * 3 + 1).to(tl.float32)
    mix = tl.load(mix_ptr + at, mask=mask, other=0.0)
    out = mix + gate[:, None] * merged(o_ptr, stat_ptr, head, SLC, SLC_PADDED, DIM, WIDE)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
