"""Compression and window attention of one new token a sequence, their keys split among programs; scores are left.

K_cmp and V_cmp are read once. The top-n needs weights of the whole softmax, whose sum is known only when all parts are
done: what is left for it are the scores, fp32 [B, Hkv, group, C], an eighth of the bytes of K_cmp and V_cmp in bf16 at
16 heads a group and d 128, and for the most part still in the L2 cache when the next kernel reads them. The window waits
for nothing; in the same programs its keys are read at the same rate, and every program has as much to do as the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.common.launch import after_earlier
from sieve.kernels.common.split_keys import empty_sum, fold, load_query, pair_of, store_part
from sieve.kernels.nsa.compress_tiles import seen_of


@triton.jit
def split_of(
    at, slots, PARTS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """How the tiles of the query at `at` are dealt out to PARTS programs: compressed slots seen, their tiles, tiles in all,
    and the program that has the first tile of the window.

    Up to that one each program leaves a result of compression in the slot of its number, if only an empty one, and from
    that one on each leaves the window's one slot later.
    """
    seen = tl.minimum(seen_of(at, KERNEL, STRIDE), slots)
    tiles = tl.cdiv(seen, KEYS)
    total = tiles + (WINDOW + KEYS - 1) // KEYS
    return seen, tiles, total, tl.cdiv((tiles + 1) * PARTS, total) - 1


@triton.jit(do_not_specialize=["slots"])
def compress_and_window(
    q_ptr, k_cmp_ptr, v_cmp_ptr, k_win_ptr, v_win_ptr, query_ptr, score_ptr, o_ptr, stat_ptr,
    k_cmp_b, k_cmp_h, k_cmp_n, v_cmp_b, v_cmp_h, v_cmp_n, k_win_b, k_win_h, k_win_n, v_win_b, v_win_h, v_win_n,
    slots, factor,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, WINDOW: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, PARTS); o and stat hold PARTS + 1 results, which of them are whose: `split_of`.

    score [B * Hkv, GROUP, slots], of what the query sees, if it has blocks to choose from.
    """
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch, kv_head = pair_of(pair, HEADS_KV)
    after_earlier(OVERLAP)
    at = tl.load(query_ptr + batch)
    q0, q1 = load_query(q_ptr, pair * GROUP, GROUP, D0, D1, ROWS)
    seen, tiles, total_tiles, windowing = split_of(at, slots, PARTS, KERNEL, STRIDE, WINDOW, KEYS)
    first_tile = total_tiles * part // PARTS
    last_tile = total_tiles * (part + 1) // PARTS
    if part <= windowing:
        k_ptr = k_cmp_ptr + batch * k_cmp_b + kv_head * k_cmp_h
        v_ptr = v_cmp_ptr + batch * v_cmp_b + kv_head * v_cmp_h
        row = tl.arange(0, ROWS)
        s_at = score_ptr + ((pair * GROUP + row).to(tl.int64) * slots)[:, None]
        kept = (row < GROUP) & (at // BLOCK >= TOPK)
        end = tl.minimum(last_tile * KEYS, seen)
        acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
        for first in range(first_tile * KEYS, end, KEYS):
            slot = first + tl.arange(0, KEYS)
            visible = slot < end
            place = slot.to(tl.int64)
            acc0, acc1, top, total, s = fold(
                acc0, acc1, top, total, q0, q1, k_ptr + place * k_cmp_n, v_ptr + place * v_cmp_n, visible, factor,
                D0, D1, E0, E1,
            )  # fmt: skip
            tl.store(s_at + slot[None, :], s, mask=kept[:, None] & visible[None, :])
        store_part(o_ptr, stat_ptr, pair * GROUP, part, PARTS + 1, acc0, acc1, top, total, GROUP, E0, E1, ROWS)
    if part >= windowing:
        k_ptr = k_win_ptr + batch * k_win_b + kv_head * k_win_h
        v_ptr = v_win_ptr + batch * v_win_b + kv_head * v_win_h
        begin = tl.maximum(first_tile - tiles, 0) * KEYS
        end = tl.minimum((last_tile - tiles) * KEYS, WINDOW)
        acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
        for first in range(begin, end, KEYS):
            key = first + tl.arange(0, KEYS)
            # Position p lies in place p % WINDOW: no list of positions that addresses would wait for.
            visible = (key < end) & ((key <= at) | (at >= WINDOW))
            place = key.to(tl.int64)
            acc0, acc1, top, total, _ = fold(
                acc0, acc1, top, total, q0, q1, k_ptr + place * k_win_n, v_ptr + place * v_win_n, visible, factor,
                D0, D1, E0, E1,
            )  # fmt: skip
        store_part(o_ptr, stat_ptr, pair * GROUP, part + 1, PARTS + 1, acc0, acc1, top, total, GROUP, E0, E1, ROWS)
