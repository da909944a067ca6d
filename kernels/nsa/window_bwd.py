"""Sliding-window attention, backward: dq by tiles of rows, dk and dv by tiles of keys, so that no sum needs an atomic.

With P = exp(scale * q k^T - lse): dS = P * (dO v^T - delta), dq = scale * dS k, dk = scale * dS^T q, dv = P^T dO, where
delta = sum(o * dO) over the head dim. Both kernels compute P anew from lse.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.descriptors import head_descriptors
from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import unit_stride
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.runs_launch import attend_dq, serves
from sieve.kernels.nsa.window_tiles import Tile, dkv_tile, dq_tile, row_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dq_sweep(
    dq1, dq2, q1, q2, do1, do2, lse, delta, k1_desc, k2_desc, v1_desc, v2_desc, kv_head,
    begin, blocks, whole, whole_end, start, token, factor,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up dq over the tile's keys, in ascending blocks."""
    for i in range(0, blocks):
        first = begin + BLOCK_N * i
        k1 = k1_desc.load([first, kv_head * (D1 + D2)])
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = k2_desc.load([first, kv_head * (D1 + D2) + D1])
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
        v1 = v1_desc.load([first, kv_head * (E1 + E2)])
        dp = tl.dot(do1, tl.trans(v1), input_precision="ieee")
        if E2 > 0:
            v2 = v2_desc.load([first, kv_head * (E1 + E2) + E1])
            dp = tl.dot(do2, tl.trans(v2), dp, input_precision="ieee")
        p = tl.exp2(s * factor - lse[:, None])
        if (i < whole) | (i >= whole_end):
            index = first + tl.arange(0, BLOCK_N)
            p = tl.where((index[None, :] >= start[:, None]) & (index[None, :] <= token[:, None]), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    return dq1, dq2


@triton.jit
def _store(x, at, row_ok, ADD: tl.constexpr):
    """Store a tile at the addresses `at`, or add it to what stands there."""
    if ADD:
        x += tl.load(at, mask=row_ok[:, None], other=0.0).to(tl.float32)
    tl.store(at, x.to(at.dtype.element_ty), mask=row_ok[:, None])


@triton.jit(do_not_specialize=["num_tokens", "window"])
def _backward_q(
    q_ptr, k1_desc, k2_desc, v1_desc, v2_desc, do_ptr, position_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_dt, stride_dh, num_tokens, window, factor, scale,
    GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    local, head, token, start, row_ok, begin, blocks, whole, whole_end = row_tile(
        position_ptr, num_tokens, 0, window, GROUP, BLOCK_M, BLOCK_N
    )
    q_base = q_ptr + (local * stride_qt + head * stride_qh)[:, None]
    do_base = do_ptr + (local * stride_ot + head * stride_oh)[:, None]
    q1 = tl.load(q_base + tl.arange(0, D1)[None, :])
    do1 = tl.load(do_base + tl.arange(0, E1)[None, :])
    q2 = q1
    do2 = do1
    if D2 > 0:
        q2 = tl.load(q_base + D1 + tl.arange(0, D2)[None, :])
    if E2 > 0:
        do2 = tl.load(do_base + E1 + tl.arange(0, E2)[None, :])
    lse = tl.load(lse_ptr + local * stride_lt + head) * LOG2_E
    delta = tl.load(delta_ptr + local * stride_lt + head)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    dq1, dq2 = _dq_sweep(
        dq1, dq2, q1, q2, do1, do2, lse, delta, k1_desc, k2_desc, v1_desc, v2_desc, kv_head,
        begin, blocks, whole, whole_end, start, token, factor, D1, D2, E1, E2, BLOCK_N,
    )  # fmt: skip
    at = dq_ptr + (local * stride_dt + head * stride_dh)[:, None]
    _store(dq1 * scale, at + tl.arange(0, D1)[None, :], row_ok, ADD)
    if D2 > 0:
        _store(dq2 * scale, at + D1 + tl.arange(0, D2)[None, :], row_ok, ADD)


@triton.jit
def _dkv_sweep(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, do_ptr, lse_ptr, delta_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt,
    first_row, steps, whole, whole_end, key, end, last_token, factor,
    GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add up dk and dv over the rows (token * GROUP + head of the group) from `first_row` on, in ascending steps."""
    m = tl.arange(0, BLOCK_M)
    for i in range(0, steps):
        row = first_row + BLOCK_M * i
        base = row // GROUP
        within = (row - base * GROUP).to(tl.int32) + m
        ahead = within // GROUP  # tokens past `base`: offsets from it stay int32
        head = within % GROUP
        token = base.to(tl.int32) + ahead
        ahead = tl.minimum(ahead, last_token - base.to(tl.int32))
        q_base = q_ptr + base * stride_qt + (ahead * stride_qt + head * stride_qh)[:, None]
        do_base = do_ptr + base * stride_ot + (ahead * stride_ot + head * stride_oh)[:, None]
        at = base * stride_lt + ahead * stride_lt + head
        q1 = tl.load(q_base + tl.arange(0, D1)[None, :])
        s = tl.dot(k1, tl.trans(q1), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if D2 > 0:
            q2 = tl.load(q_base + D1 + tl.arange(0, D2)[None, :])
            s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")
        lse = tl.load(lse_ptr + at) * LOG2_E
        p = tl.exp2(s * factor - lse[None, :])
        if (i < whole) | (i >= whole_end):
            p = tl.where((token[None, :] >= key[:, None]) & (token[None, :] < end[:, None]), p, 0.0)
        do1 = tl.load(do_base + tl.arange(0, E1)[None, :])
        dp = tl.dot(v1, tl.trans(do1), input_precision="ieee")
        dv1 = tl.dot(p.to(do1.dtype), do1, dv1, input_precision="ieee")
        if E2 > 0:
            do2 = tl.load(do_base + E1 + tl.arange(0, E2)[None, :])
            dp = tl.dot(v2, tl.trans(do2), dp, input_precision="ieee")
            dv2 = tl.dot(p.to(do2.dtype), do2, dv2, input_precision="ieee")
        delta = tl.load(delta_ptr + at)
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=["num_tokens", "window"])
def _backward_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, cu_ptr, doc_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_lt, stride_dkt, stride_dvt, num_tokens, window, factor, scale,
    GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    last = tl.minimum(first + BLOCK_N, num_tokens) - 1
    key = first + tl.arange(0, BLOCK_N)
    key_ok = key < num_tokens
    key = tl.minimum(key, last)
    # A key is seen by the tokens [key, end): up to the window's width on, within its document.
    end = tl.minimum(key + window, tl.load(cu_ptr + 1 + tl.load(doc_ptr + key)))
    first_end = tl.minimum(first + window, tl.load(cu_ptr + 1 + tl.load(doc_ptr + first)))
    last_end = tl.minimum(last + window, tl.load(cu_ptr + 1 + tl.load(doc_ptr + last)))
    first_row = first.to(tl.int64) * GROUP
    steps = tl.cdiv((last_end - first) * GROUP, BLOCK_M)
    # The tokens [last, first_end) see every key of the tile: no mask there.
    whole = tl.cdiv((last - first) * GROUP, BLOCK_M)
    whole_end = (first_end - first) * GROUP // BLOCK_M

    key64 = key.to(tl.int64)
    k_base = k_ptr + (key64 * stride_kt + kv_head * stride_kh)[:, None]
    v_base = v_ptr + (key64 * stride_vt + kv_head * stride_vh)[:, None]
    k1 = tl.load(k_base + tl.arange(0, D1)[None, :])
    v1 = tl.load(v_base + tl.arange(0, E1)[None, :])
    k2 = k1
    v2 = v1
    if D2 > 0:
        k2 = tl.load(k_base + D1 + tl.arange(0, D2)[None, :])
    if E2 > 0:
        v2 = tl.load(v_base + E1 + tl.arange(0, E2)[None, :])
    q_ptr += kv_head * GROUP * stride_qh
    do_ptr += kv_head * GROUP * stride_oh
    lse_ptr += kv_head * GROUP
    delta_ptr += kv_head * GROUP
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, E1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 1], tl.float32)
    dv2 = tl.zeros([BLOCK_N, E2 if E2 > 0 else 1], tl.float32)
    dk1, dk2, dv1, dv2 = _dkv_sweep(
        dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, do_ptr, lse_ptr, delta_ptr,
        stride_qt, stride_qh, stride_ot, stride_oh, stride_lt,
        first_row, steps, whole, whole_end, key, end, last_end - 1, factor, GROUP, D1, D2, E1, E2, BLOCK_M,
    )  # fmt: skip
    dk_base = dk_ptr + (key64 * stride_dkt + kv_head * (D1 + D2))[:, None]
    dv_base = dv_ptr + (key64 * stride_dvt + kv_head * (E1 + E2))[:, None]
    _store(dk1 * scale, dk_base + tl.arange(0, D1)[None, :], key_ok, False)
    _store(dv1, dv_base + tl.arange(0, E1)[None, :], key_ok, False)
    if D2 > 0:
        _store(dk2 * scale, dk_base + D1 + tl.arange(0, D2)[None, :], key_ok, False)
    if E2 > 0:
        _store(dv2, dv_base + E1 + tl.arange(0, E2)[None, :], key_ok, False)


def window_dq(
    do: Tensor, q: Tensor, k_win: Tensor, v_win: Tensor, lse: Tensor, delta: Tensor, packing: Packing, window_size: int,
    *, scale: float, dq: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:
    """dq [T, H, Dqk] of window_attention_fwd in q's dtype; added to `dq` in place where one is given.

    do [T, H, Dv]; lse, delta fp32 [T, H] contiguous, delta = sum(o * do) over Dv. With lse lowered by log g and
    do, delta of g * o, that is of a gated output, the results are the gradients through the gate.
    """
    do, q = unit_stride(do), unit_stride(q)
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k_win.shape[1], v_win.shape[2]
    add = dq is not None
    dq = dq if add else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return dq
    if tile is None and serves(q, kv_heads, d_v):
        attend_dq(do, q, k_win, v_win, lse, delta, packing, dq, scale=scale, add=add, window=min(window_size, tokens))
        return dq
    tile = tile or dq_tile(d_qk, d_v, q.dtype)
    (d1, d2), (e1, e2), group = split_dim(d_qk), split_dim(d_v), heads // kv_heads
    _backward_q[(triton.cdiv(tokens * group, tile.block_m), kv_heads)](
        q, *head_descriptors(k_win, tile.block_n), *head_descriptors(v_win, tile.block_n), do,
        packing.position, lse, delta, dq,
        q.stride(0), q.stride(1), do.stride(0), do.stride(1), lse.stride(0), dq.stride(0), dq.stride(1),
        tokens, min(window_size, tokens), scale * math.log2(math.e), scale,
        GROUP=group, D1=d1, D2=d2, E1=e1, E2=e2, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, ADD=add,
        **tile.options,
    )  # fmt: skip
    return dq


def window_dkv(
    do: Tensor, q: Tensor, k_win: Tensor, v_win: Tensor, lse: Tensor, delta: Tensor, packing: Packing, window_size: int,
    *, scale: float, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """dk [T, Hkv, Dqk] and dv [T, Hkv, Dv] of window_attention_fwd; arguments as window_dq's."""
    do, q, k_win, v_win = (unit_stride(x) for x in (do, q, k_win, v_win))
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k_win.shape[1], v_win.shape[2]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k_win, v_win))
    if tokens == 0:
        return dk, dv
    tile = tile or dkv_tile(d_qk, d_v, q.dtype)
    (d1, d2), (e1, e2), group = split_dim(d_qk), split_dim(d_v), heads // kv_heads
    _backward_kv[(triton.cdiv(tokens, tile.block_n), kv_heads)](
        q, k_win, v_win, do, packing.cu_seqlens, packing.doc, lse, delta, dk, dv,
        q.stride(0), q.stride(1), k_win.stride(0), k_win.stride(1), v_win.stride(0), v_win.stride(1),
        do.stride(0), do.stride(1), lse.stride(0), dk.stride(0), dv.stride(0),
        tokens, min(window_size, tokens), scale * math.log2(math.e), scale,
        GROUP=group, D1=d1, D2=d2, E1=e1, E2=e2, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        **tile.options,
    )  # fmt: skip
    return dk, dv
