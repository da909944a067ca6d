"""Compression attention, backward: dq, by the forward's tiles of rows.

With P = exp(scale * q k^T - lse): dS = P * (dO v^T - delta), dq = scale * dS k.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import unit_stride
from sieve.kernels.nsa.compress_tiles import (
    Tile,
    doc_slots,
    dq_tile,
    exponent,
    seen_of,
    slot_descriptors,
    whole_slots,
)
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.runs_launch import attend_dq, serves


@triton.jit
def _sweep(
    dq0, dq1, q0, q1, do0, do1, lse, delta, k0_desc, k1_desc, v0_desc, v1_desc, kv_head, begin, end, row_end, factor,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add up dq over the slots [begin, end); MASKED if some row does not see all of them."""
    for first in range(begin, end, SLOTS):
        k0 = k0_desc.load([first, kv_head * (D0 + D1)])
        s = tl.dot(q0, k0.T, input_precision="ieee")
        if D1 > 0:
            k1 = k1_desc.load([first, kv_head * (D0 + D1) + D0])
            s = tl.dot(q1, k1.T, s, input_precision="ieee")
        v0 = v0_desc.load([first, kv_head * (E0 + E1)])
        dp = tl.dot(do0, v0.T, input_precision="ieee")
        if E1 > 0:
            v1 = v1_desc.load([first, kv_head * (E0 + E1) + E0])
            dp = tl.dot(do1, v1.T, dp, input_precision="ieee")
        p = tl.exp2(s * factor - lse[:, None])
        if MASKED:
            slot = first + tl.arange(0, SLOTS)
            p = tl.where(slot[None, :] < row_end[:, None], p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def _store(dq, at, row_ok, ADD: tl.constexpr):
    if ADD:
        dq += tl.load(at, mask=row_ok[:, None], other=0.0).to(tl.float32)
    tl.store(at, dq.to(at.dtype.element_ty), mask=row_ok[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_q(
    do_ptr, q_ptr, k0_desc, k1_desc, v0_desc, v1_desc, lse_ptr, delta_ptr, doc_ptr, position_ptr, cu_ptr, dq_ptr,
    stride_ot, stride_oh, stride_qt, stride_qh, stride_dt, stride_dh, num_tokens, factor, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    first_token = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    row = tl.arange(0, ROWS)
    row_ok = (row < TOKENS * GROUP) & (first_token + row // GROUP < num_tokens)
    token = tl.minimum(first_token + row // GROUP, num_tokens - 1)
    head = (kv_head * GROUP + row % GROUP).to(tl.int64)

    q_at = q_ptr + (token.to(tl.int64) * stride_qt + head * stride_qh)[:, None]
    do_at = do_ptr + (token.to(tl.int64) * stride_ot + head * stride_oh)[:, None]
    q0 = tl.load(q_at + tl.arange(0, D0)[None, :])
    do0 = tl.load(do_at + tl.arange(0, E0)[None, :])
    q1 = q0
    do1 = do0
    if D1 > 0:
        q1 = tl.load(q_at + D0 + tl.arange(0, D1)[None, :])
    if E1 > 0:
        do1 = tl.load(do_at + E0 + tl.arange(0, E1)[None, :])
    at = token.to(tl.int64) * HEADS + head
    lse = exponent(tl.load(lse_ptr + at))
    delta = tl.load(delta_ptr + at)
    last_token = tl.minimum(first_token + TOKENS, num_tokens) - 1
    begin, whole = whole_slots(doc_ptr, position_ptr, cu_ptr, first_token, last_token, SLOTS, KERNEL, STRIDE)
    row_doc = tl.load(doc_ptr + token)
    row_seen = seen_of(tl.load(position_ptr + token), KERNEL, STRIDE)

    dq0 = tl.zeros([ROWS, D0], tl.float32)
    dq1 = tl.zeros([ROWS, D1 if D1 > 0 else 1], tl.float32)
    dq0, dq1 = _sweep(
        dq0, dq1, q0, q1, do0, do1, lse, delta, k0_desc, k1_desc, v0_desc, v1_desc, kv_head, begin, whole, row_seen,
        factor, D0, D1, E0, E1, SLOTS, False,
    )  # fmt: skip
    first_doc = tl.load(doc_ptr + first_token)
    # A document that begins within the tile shows its queries there none of its slots, where the tile is short.
    last_doc = tl.load(doc_ptr + last_token) if TOKENS > KERNEL else first_doc
    for doc in range(first_doc, last_doc + 1):
        begin, end = doc_slots(doc, doc_ptr, position_ptr, cu_ptr, last_token, KERNEL, STRIDE)
        dq0, dq1 = _sweep(
            dq0, dq1, q0, q1, do0, do1, lse, delta, k0_desc, k1_desc, v0_desc, v1_desc, kv_head,
            tl.maximum(begin, whole), end, tl.where(row_doc == doc, begin + row_seen, 0),
            factor, D0, D1, E0, E1, SLOTS, True,
        )  # fmt: skip
    dq_at = dq_ptr + (token.to(tl.int64) * stride_dt + head * stride_dh)[:, None]
    _store(dq0 * scale, dq_at + tl.arange(0, D0)[None, :], row_ok, ADD)
    if D1 > 0:
        _store(dq1 * scale, dq_at + D0 + tl.arange(0, D1)[None, :], row_ok, ADD)


def compressed_dq(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, lse: Tensor, delta: Tensor, packing: Packing,
    geometry: Geometry, *, scale: float, dq: Tensor, add: bool, tile: Tile | None = None,
) -> None:
    """Write the gradient of q into dq [T, H, Dqk] (last stride 1), or add it to what stands there.

    do [T, H, Dv], q [T, H, Dqk], k_cmp [C, Hkv, Dqk], v_cmp [C, Hkv, Dv]; lse, delta = sum(o * do): fp32 [T, H]. lse
    may be shifted by -log of a factor of do; -inf stands for a query that sees no block, and rows of +inf give 0.
    """
    tokens, heads, d_qk = q.shape
    slots, kv_heads, d_v = v_cmp.shape
    (d0, d1), (e0, e1) = split_dim(d_qk), split_dim(d_v)
    if not tokens or not slots:
        if not add:
            dq.zero_()
        return
    if tile is None and serves(q, kv_heads, d_v, geometry):
        lse, delta = lse.contiguous(), delta.contiguous()
        attend_dq(do, q, k_cmp, v_cmp, lse, delta, packing, dq, scale=scale, add=add, geometry=geometry)
        return
    group, q, do = heads // kv_heads, unit_stride(q), unit_stride(do)
    tile = tile or dq_tile(group, d_qk, d_v, q.dtype)
    _backward_q[(triton.cdiv(tokens, tile.rows // group), kv_heads)](
        do, q, *slot_descriptors(k_cmp, tile.slots), *slot_descriptors(v_cmp, tile.slots),
        lse.contiguous(), delta.contiguous(), packing.doc, packing.position, packing.cu_seqlens, dq,
        *do.stride()[:2], *q.stride()[:2], *dq.stride()[:2], tokens, scale / math.log(2), scale,
        HEADS=heads, GROUP=group, D0=d0, D1=d1, E0=e0, E1=e1, KERNEL=geometry.kernel_size,
        STRIDE=geometry.kernel_stride, ROWS=tile.rows, SLOTS=tile.slots, ADD=add, **tile.options,
    )  # fmt: skip
