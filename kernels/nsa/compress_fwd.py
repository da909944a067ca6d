"""Compression attention (equations 7 and 8), forward: launcher, and the Triton kernel for what the Hopper one does not serve.

A tile is `rows` (token, head of the KV group) pairs, so that a group's heads share every compressed key that is loaded.
It walks its documents' slots up to the last its queries see; only the last of them, and tiles that touch several
documents, need a mask.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import unit_stride
from sieve.kernels.nsa.compress_tiles import Tile, doc_slots, forward_tile, seen_of, slot_descriptors, whole_slots
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.runs_launch import attend, serves, slots_together


@triton.jit
def softmax_step(s, top, total, factor, MASKED: tl.constexpr):
    """One step of the running softmax over scores [ROWS, SLOTS], -inf where not seen: the weights, what earlier sums shrink by,
    the largest score so far and the sum of weights. MASKED: a row may have seen nothing yet."""
    higher = tl.maximum(top, tl.max(s, 1) * factor)
    # Then any finite number here keeps its weights at 0 instead of NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = tl.exp2(s * factor - shift[:, None])
    shrink = tl.exp2(top - shift)
    return p, shrink, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def natural_lse(top, total):
    """-inf for a row that saw nothing."""
    LN_2: tl.constexpr = 0.6931471805599453
    return tl.where(total > 0.0, (top + tl.log2(tl.where(total > 0.0, total, 1.0))) * LN_2, float("-inf"))


@triton.jit
def _sweep(
    acc0, acc1, top, total, q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, kv_head, begin, end, row_end, factor,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the slots [begin, end) into the running softmax; MASKED if some row does not see all of them."""
    for first in range(begin, end, SLOTS):
        k0 = k0_desc.load([first, kv_head * (D0 + D1)])
        s = tl.dot(q0, k0.T, input_precision="ieee")
        if D1 > 0:
            k1 = k1_desc.load([first, kv_head * (D0 + D1) + D0])
            s = tl.dot(q1, k1.T, s, input_precision="ieee")
        if MASKED:
            slot = first + tl.arange(0, SLOTS)
            s = tl.where(slot[None, :] < row_end[:, None], s, float("-inf"))
        p, shrink, top, total = softmax_step(s, top, total, factor, MASKED)
        v0 = v0_desc.load([first, kv_head * (E0 + E1)])
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
        if E1 > 0:
            v1 = v1_desc.load([first, kv_head * (E0 + E1) + E0])
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, top, total


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    q_ptr, k0_desc, k1_desc, v0_desc, v1_desc, doc_ptr, position_ptr, cu_ptr, o_ptr, lse_ptr, stride_qt, stride_qh,
    num_tokens, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    # The longest first: late tokens see the most.
    first_token = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    row = tl.arange(0, ROWS)
    row_ok = (row < TOKENS * GROUP) & (first_token + row // GROUP < num_tokens)
    token = tl.minimum(first_token + row // GROUP, num_tokens - 1)
    head = (kv_head * GROUP + row % GROUP).to(tl.int64)

    q_at = q_ptr + (token.to(tl.int64) * stride_qt + head * stride_qh)[:, None]
    q0 = tl.load(q_at + tl.arange(0, D0)[None, :])
    q1 = q0
    if D1 > 0:
        q1 = tl.load(q_at + D0 + tl.arange(0, D1)[None, :])
    last_token = tl.minimum(first_token + TOKENS, num_tokens) - 1
    begin, whole = whole_slots(doc_ptr, position_ptr, cu_ptr, first_token, last_token, SLOTS, KERNEL, STRIDE)
    row_doc = tl.load(doc_ptr + token)
    row_seen = seen_of(tl.load(position_ptr + token), KERNEL, STRIDE)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, E0], tl.float32)
    acc1 = tl.zeros([ROWS, E1 if E1 > 0 else 1], tl.float32)
    acc0, acc1, top, total = _sweep(
        acc0, acc1, top, total, q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, kv_head, begin, whole, row_seen, factor,
        D0, D1, E0, E1, SLOTS, False,
    )  # fmt: skip
    first_doc = tl.load(doc_ptr + first_token)
    # A document that begins within the tile shows its queries there none of its slots, where the tile is short.
    last_doc = tl.load(doc_ptr + last_token) if TOKENS > KERNEL else first_doc
    for doc in range(first_doc, last_doc + 1):
        begin, end = doc_slots(doc, doc_ptr, position_ptr, cu_ptr, last_token, KERNEL, STRIDE)
        acc0, acc1, top, total = _sweep(
            acc0, acc1, top, total, q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, kv_head, tl.maximum(begin, whole), end,
            tl.where(row_doc == doc, begin + row_seen, 0), factor, D0, D1, E0, E1, SLOTS, True,
        )  # fmt: skip

    at = token.to(tl.int64) * HEADS + head
    tl.store(lse_ptr + at, natural_lse(top, total), mask=row_ok)
    o_at = o_ptr + (at * (E0 + E1))[:, None]
    scale = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    tl.store(o_at + tl.arange(0, E0)[None, :], (acc0 * scale).to(o_ptr.dtype.element_ty), mask=row_ok[:, None])
    if E1 > 0:
        tl.store(o_at + E0 + tl.arange(0, E1)[None, :], (acc1 * scale).to(o_ptr.dtype.element_ty), mask=row_ok[:, None])


def softmax_tile(q: Tensor, kv_heads: int, d_v: int, geometry: Geometry) -> tuple[int, int]:
    """(rows that four warps hold, slots of a step) of compressed_attention_fwd for q [T, H, Dqk]: the last bits of lse are
    those of sums in this order."""
    group, d_qk = q.shape[1] // kv_heads, q.shape[2]
    if serves(q, kv_heads, d_v, geometry):
        return 64, slots_together(d_qk, d_v)
    tile = forward_tile(group, d_qk, d_v, q.dtype)
    return max(tile.rows * 4 // tile.num_warps, triton.next_power_of_2(group)), tile.slots


def compressed_attention_fwd(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, packing: Packing, geometry: Geometry, *, scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed blocks that end at or before the query.

    q [T, H, Dqk], k_cmp [C, Hkv, Dqk], v_cmp [C, Hkv, Dv] in slots (CompressedSlots) -> o [T, H, Dv] in q's dtype,
    natural lse fp32 [T, H]. A query that sees no block has o exactly 0 and lse -inf. scale must be positive. packing.doc and
    packing.position may be a run of the row's tokens, if q is the same run. `tile` asks for the Triton kernel, with that tile.
    Source: arXiv 2502.11089.
    """
    tokens, heads, d_qk = q.shape
    slots, kv_heads, d_v = v_cmp.shape
    (d0, d1), (e0, e1) = split_dim(d_qk), split_dim(d_v)
    o = q.new_empty(tokens, heads, d_v)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens or not slots:
        return o.zero_(), lse.fill_(-math.inf)
    if tile is None and serves(q, kv_heads, d_v, geometry):
        attend(q, k_cmp, v_cmp, packing, o, lse, scale=scale, geometry=geometry)
        return o, lse
    group, q = heads // kv_heads, unit_stride(q)
    tile = tile or forward_tile(group, d_qk, d_v, q.dtype)
    _forward[(triton.cdiv(tokens, tile.rows // group), kv_heads)](
        q, *slot_descriptors(k_cmp, tile.slots), *slot_descriptors(v_cmp, tile.slots),
        packing.doc, packing.position, packing.cu_seqlens, o, lse, *q.stride()[:2], tokens, scale / math.log(2),
        HEADS=heads, GROUP=group, D0=d0, D1=d1, E0=e0, E1=e1, KERNEL=geometry.kernel_size,
        STRIDE=geometry.kernel_stride, ROWS=tile.rows, SLOTS=tile.slots, **tile.options,
    )  # fmt: skip
    return o, lse
