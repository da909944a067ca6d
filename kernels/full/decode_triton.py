"""Full or windowed attention of one new token a sequence over cached keys in Triton: split over keys, then merged.

Grids and memory follow from shapes alone and nothing is read on the host, so that the two launches can stand in a CUDA
graph that is replayed while the sequences grow.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import after_earlier, can_overlap, multiprocessors, overlap_options, unit_stride
from sieve.kernels.common.split_keys import (
    Tile,
    decode_tile,
    empty_sum,
    fold,
    load_query,
    merged,
    pair_of,
    part_range,
    parts_of,
    store_part,
)  # fmt: skip


@triton.jit(do_not_specialize=["places"])
def _attend(
    q_ptr, k_ptr, v_ptr, query_ptr, key_ptr, o_ptr, stat_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_pn, places, factor,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    IN_ORDER: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, PARTS). IN_ORDER: place p holds position p, so that what lies past the query is never looked at."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch, kv_head = pair_of(pair, HEADS_KV)
    after_earlier(OVERLAP)
    at = tl.load(query_ptr + batch)
    q0, q1 = load_query(q_ptr, pair * GROUP, GROUP, D0, D1, ROWS)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    low = 0
    high = places
    if IN_ORDER:
        high = tl.minimum(at + 1, places)
        if WINDOW > 0:
            low = tl.maximum(high - WINDOW, 0)
    begin, end = part_range(high - low, part, PARTS, KEYS)
    acc0, acc1, top, total = empty_sum(ROWS, E0, E1)
    for first in range(low + begin, low + end, KEYS):
        place = first + tl.arange(0, KEYS)
        visible = place < low + end
        if not IN_ORDER:
            key = tl.load(key_ptr + batch * stride_pb + place * stride_pn, mask=visible, other=-1)
            visible = (key >= 0) & (key <= at)
            if WINDOW > 0:
                visible = visible & (key > at - WINDOW)
        row = place.to(tl.int64)
        acc0, acc1, top, total, _ = fold(
            acc0, acc1, top, total, q0, q1, k_ptr + row * stride_kn, v_ptr + row * stride_vn, visible, factor,
            D0, D1, E0, E1,
        )  # fmt: skip
    store_part(o_ptr, stat_ptr, pair * GROUP, part, PARTS, acc0, acc1, top, total, GROUP, E0, E1, ROWS)


@triton.jit
def _merge(
    o_ptr, stat_ptr, out_ptr, PARTS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H)."""
    head = tl.program_id(0) + tl.arange(0, 1)
    after_earlier(OVERLAP)
    out = merged(o_ptr, stat_ptr, head, PARTS, PADDED, DIM, WIDE)
    column = tl.arange(0, WIDE)[None, :]
    at = out_ptr + (head.to(tl.int64) * DIM)[:, None] + column
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=column < DIM)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor, key: Tensor | None, *, scale: float, window: int | None = None,
    tile: Tile | None = None, programs: int | None = None, overlap: bool | None = None,
) -> Tensor:
    """See sieve.kernels.full.decode, n = 1. programs: about how many run at once (None: two a multiprocessor).
    overlap: the launches begin before those ahead of them end (None: where the device can)."""
    (B, n, H, Dqk), (_, Hkv, places, Dv) = q.shape, v.shape
    if n != 1:
        raise ValueError(f"q {list(q.shape)} has {n} tokens a sequence; the decode kernels take one")
    (d0, d1), (e0, e1) = split_dim(Dqk), split_dim(Dv)
    group, pairs = H // Hkv, B * Hkv
    tile = tile or decode_tile(group, Dqk, Dv, q.dtype)
    most = places if window is None or key is not None else min(places, window)
    parts = parts_of(pairs, triton.cdiv(most, tile.keys), programs or 2 * multiprocessors(q.device))
    overlap = can_overlap(q.device) if overlap is None else overlap
    q, query, k, v = q.contiguous(), query.contiguous(), unit_stride(k), unit_stride(v)
    o = q.new_empty((B * H, parts, Dv), dtype=torch.float32)
    stat = q.new_empty((B * H, parts, 2), dtype=torch.float32)
    out = q.new_empty(B, 1, H, Dv)
    _attend[(pairs, parts)](
        q, k, v, query, query if key is None else key, o, stat, *k.stride()[:3], *v.stride()[:3],
        *(key.stride() if key is not None else (0, 0)), places, scale / math.log(2), HEADS_KV=Hkv, GROUP=group, D0=d0,
        D1=d1, E0=e0, E1=e1, IN_ORDER=key is None, WINDOW=window or 0, PARTS=parts, ROWS=tile.rows, KEYS=tile.keys,
        OVERLAP=overlap, **tile.options, **overlap_options(overlap),
    )  # fmt: skip
    _merge[(B * H,)](
        o, stat, out, PARTS=parts, PADDED=triton.next_power_of_2(parts), DIM=Dv, WIDE=triton.next_power_of_2(Dv),
        OVERLAP=overlap, num_warps=4, **overlap_options(overlap),
    )  # fmt: skip
    return out
