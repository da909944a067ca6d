"""Equation 9, the window, the top-n and the selected blocks of one new token a sequence.

`weigh_and_window` turns the scores into importances, in many programs, beside others that attend to the window, which
waits for nothing. Then each program of `select` picks its pair's blocks, all those of a pair the same ones, which spares
a launch, and attends to its share of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.common.split_keys import empty_sum, fold, load_query, part_range, store_part
from sieve.kernels.nsa.compress_tiles import seen_of
from sieve.kernels.nsa.topk_rows import pick_blocks


@triton.jit
def _weigh(
    score_ptr, stat_ptr, own_ptr, next_ptr, first_head, seen, slots, parts, first_block, step,
    GROUP: tl.constexpr, A: tl.constexpr, A_PADDED: tl.constexpr, B: tl.constexpr, CMP: tl.constexpr,
    CMP_PADDED: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store own and next (see scores_topk.py) of SLOTS / A_PADDED blocks from first_block on, and every `step` further."""
    BLOCKS: tl.constexpr = SLOTS // A_PADDED
    head = tl.arange(0, PADDED)
    part = tl.arange(0, CMP_PADDED)
    at = stat_ptr + 2 * ((first_head + head).to(tl.int64)[:, None] * parts + part[None, :])
    ok = (head < GROUP)[:, None] & (part < CMP)[None, :]
    top = tl.load(at, mask=ok, other=float("-inf"))
    total = tl.load(at + 1, mask=ok, other=0.0)
    highest = tl.max(top, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp2(top - shift[:, None]), 1)
    lse = tl.where(total > 0.0, shift + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
    inside = tl.arange(0, A_PADDED)
    own_weight = tl.where(inside < A, tl.minimum(A - inside, B), 0).to(tl.float32)[None, :]
    next_weight = tl.where(inside < A, tl.maximum(inside - A + B, 0), 0).to(tl.float32)[None, :]
    place = tl.arange(0, SLOTS) % A_PADDED
    s_at = score_ptr + ((first_head + head).to(tl.int64) * slots)[:, None]
    blocks = tl.cdiv(seen, A)
    for first in range(first_block, blocks, step):
        slot = (first + tl.arange(0, SLOTS) // A_PADDED) * A + place
        mask = (head < GROUP)[:, None] & ((slot < seen) & (place < A))[None, :]
        s = tl.load(s_at + slot[None, :], mask=mask, other=float("-inf"))
        p = tl.reshape(tl.sum(tl.exp2(s - lse[:, None]), 0), [BLOCKS, A_PADDED])
        block = first + tl.arange(0, BLOCKS)
        tl.store(own_ptr + block, tl.sum(p * own_weight, 1), mask=block < blocks)
        if B > 1:
            tl.store(next_ptr + block + 1, tl.sum(p * next_weight, 1), mask=block < blocks)


@triton.jit(do_not_specialize=["slots", "parts", "width"])
def weigh_and_window(
    q_ptr, k_ptr, v_ptr, query_ptr, score_ptr, rank_ptr, o_ptr, stat_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    slots, parts, width, factor,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, WINDOW: tl.constexpr,
    A_PADDED: tl.constexpr, CMP: tl.constexpr, CMP_PADDED: tl.constexpr, WEIGH: tl.constexpr, WIN: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, WIN + WEIGH). rank fp32 [B * Hkv, 2, width]: own and next; parts CMP .. CMP + WIN are the window's."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch = (pair // HEADS_KV).to(tl.int64)
    kv_head = (pair % HEADS_KV).to(tl.int64)
    at = tl.load(query_ptr + batch)
    if part < WIN:
        q0, q1 = load_query(q_ptr, pair * GROUP, GROUP, D0, D1, ROWS)
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        begin, end = part_range(WINDOW, part, WIN, KEYS)
        acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
        for first in range(begin, end, KEYS):
            place = first + tl.arange(0, KEYS)
            # Position p lies in place p % WINDOW: no list of positions that addresses would wait for.
            visible = (place < end) & ((place <= at) | (at >= WINDOW))
            row = place.to(tl.int64)
            acc0, acc1, top, total, _ = fold(
                acc0, acc1, top, total, q0, q1, k_ptr + row * stride_kn, v_ptr + row * stride_vn, visible, factor,
                D0, D1, E0, E1,
            )  # fmt: skip
        store_part(o_ptr, stat_ptr, pair * GROUP, CMP + part, parts, acc0, acc1, top, total, GROUP, E0, E1, ROWS)
    elif at // BLOCK >= TOPK:
        own_ptr = rank_ptr + pair.to(tl.int64) * (2 * width)
        BLOCKS: tl.constexpr = SLOTS // A_PADDED
        _weigh(
            score_ptr, stat_ptr, own_ptr, own_ptr + width, pair * GROUP,
            tl.minimum(seen_of(at, KERNEL, STRIDE), slots), slots, parts, (part - WIN) * BLOCKS, WEIGH * BLOCKS,
            GROUP, BLOCK // STRIDE, A_PADDED, KERNEL // STRIDE, CMP, CMP_PADDED, PADDED, SLOTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "parts", "width"])
def select(
    q_ptr, k_ptr, v_ptr, query_ptr, rank_ptr, index_ptr, o_ptr, stat_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, slots, parts, width, factor,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_CHUNK: tl.constexpr, BEFORE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, PARTS). index int32 [PARTS, B * Hkv, TOPK], all parts alike; BEFORE: other branches' parts."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch = (pair // HEADS_KV).to(tl.int64)
    kv_head = (pair % HEADS_KV).to(tl.int64)
    at = tl.load(query_ptr + batch)
    current = at // BLOCK
    # A query with no more candidates than it may choose takes them all, whatever they weigh.
    seen = tl.where(current >= TOPK, tl.minimum(seen_of(at, KERNEL, STRIDE), slots), 0)
    own_ptr = rank_ptr + pair.to(tl.int64) * (2 * width)
    index_ptr += (part * tl.num_programs(0) + pair) * TOPK
    one = tl.zeros([1], tl.int32)
    pick_blocks(
        own_ptr + one, own_ptr + width + one, index_ptr + one, current + one, seen + one, one == 0,
        1, BLOCK // STRIDE, KERNEL > STRIDE, INIT, LOCAL, TOPK, LOG_WIDTH, LOG_CHUNK,
    )  # fmt: skip
    tl.debug_barrier()  # the indices were written by other threads than will read them

    q0, q1 = load_query(q_ptr, pair * GROUP, GROUP, D0, D1, ROWS)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    begin, end = part_range(tl.minimum(current + 1, TOPK) * BLOCK, part, PARTS, KEYS)
    acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
    place = tl.arange(0, 2**LOG_WIDTH)
    picked = tl.load(index_ptr + place, mask=place < TOPK, other=-1)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        if BLOCK % KEYS == 0:  # from registers, so that the loads of several tiles can be under way
            chosen = tl.sum(tl.where(place == first // BLOCK, picked, 0), 0)
        else:
            chosen = tl.load(index_ptr + tl.minimum(key // BLOCK, TOPK - 1))
        token = chosen * BLOCK + key % BLOCK
        visible = (key < end) & (chosen >= 0) & (token <= at)
        row = token.to(tl.int64)
        acc0, acc1, top, total, _ = fold(
            acc0, acc1, top, total, q0, q1, k_ptr + row * stride_kn, v_ptr + row * stride_vn, visible, factor,
            D0, D1, E0, E1,
        )  # fmt: skip
    store_part(o_ptr, stat_ptr, pair * GROUP, BEFORE + part, parts, acc0, acc1, top, total, GROUP, E0, E1, ROWS)
