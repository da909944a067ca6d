"""Compression attention of one new token a sequence, its keys split among programs; scores are left for the top-n.

K_cmp and V_cmp are read once. The top-n needs weights of the whole softmax, whose sum is known only when all parts are
done: what is left for it are the scores, fp32 [B, Hkv, group, C], an eighth of the bytes of K_cmp and V_cmp in bf16 at
16 heads a group and d 128, and for the most part still in the L2 cache when the next kernel reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.common.split_keys import empty_sum, fold, load_query, part_range, store_part
from sieve.kernels.nsa.compress_tiles import seen_of


@triton.jit(do_not_specialize=["slots", "parts"])
def compress(
    q_ptr, k_ptr, v_ptr, query_ptr, score_ptr, o_ptr, stat_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, slots, parts, factor,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, PARTS). score [B * Hkv, GROUP, slots], of what the query sees, if it has blocks to choose from."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch = (pair // HEADS_KV).to(tl.int64)
    kv_head = (pair % HEADS_KV).to(tl.int64)
    at = tl.load(query_ptr + batch)
    seen = tl.minimum(seen_of(at, KERNEL, STRIDE), slots)
    begin, end = part_range(seen, part, PARTS, KEYS)
    q0, q1 = load_query(q_ptr, pair * GROUP, GROUP, D0, D1, ROWS)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    row = tl.arange(0, ROWS)
    s_at = score_ptr + ((pair * GROUP + row).to(tl.int64) * slots)[:, None]
    kept = (row < GROUP) & (at // BLOCK >= TOPK)
    acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
    for first in range(begin, end, KEYS):
        slot = first + tl.arange(0, KEYS)
        visible = slot < end
        place = slot.to(tl.int64)
        acc0, acc1, top, total, s = fold(
            acc0, acc1, top, total, q0, q1, k_ptr + place * stride_kn, v_ptr + place * stride_vn, visible, factor,
            D0, D1, E0, E1,
        )  # fmt: skip
        tl.store(s_at + slot[None, :], s, mask=kept[:, None] & visible[None, :])
    store_part(o_ptr, stat_ptr, pair * GROUP, part, parts, acc0, acc1, top, total, GROUP, E0, E1, ROWS)
