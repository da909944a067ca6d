"""Sliding-window attention, forward: launcher, and the Triton kernel for what the Hopper one (runs_hopper) does not serve.

A tile is BLOCK_M rows of one KV group, a row being a (token, head of the group) pair, so that the group's heads share
every key that is loaded, whatever their number. Its keys are one run, whose inner blocks need no mask.
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
from sieve.kernels.nsa.runs_launch import attend, serves
from sieve.kernels.nsa.window_tiles import Tile, forward_tile, row_tile


@triton.jit
def _sweep(
    acc1, acc2, top, total, q1, q2, k1_desc, k2_desc, v1_desc, v2_desc, kv_head, begin, blocks, whole, whole_end,
    start, token, factor,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the tile's keys, in ascending blocks, into the running softmax."""
    for i in range(0, blocks):
        first = begin + BLOCK_N * i
        k1 = k1_desc.load([first, kv_head * (D1 + D2)])
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = k2_desc.load([first, kv_head * (D1 + D2) + D1])
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
        if (i < whole) | (i >= whole_end):  # an `if` around arithmetic, not around loads, leaves the loop pipelined
            index = first + tl.arange(0, BLOCK_N)
            s = tl.where((index[None, :] >= start[:, None]) & (index[None, :] <= token[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        p = tl.exp2(s * factor - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        v1 = v1_desc.load([first, kv_head * (E1 + E2)])
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision="ieee")
        if E2 > 0:
            v2 = v2_desc.load([first, kv_head * (E1 + E2) + E1])
            acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * shrink[:, None], input_precision="ieee")
    return acc1, acc2, top, total


@triton.jit
def _finish(
    o, column, row_ok, token64, head, o_ptr, out_ptr, cmp_ptr, slc_ptr, g_cmp, g_slc, g_win, stride_ot, stride_oh,
    KEEP: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Store a tile of outputs and, if asked, the gated sum with the other branches' outputs (equation 5)."""
    at = (token64 * stride_ot + head * stride_oh)[:, None] + column[None, :]
    if KEEP:
        tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=row_ok[:, None])
    if COMBINE:
        out = g_win[:, None] * o
        out += g_cmp[:, None] * tl.load(cmp_ptr + at, mask=row_ok[:, None], other=0.0).to(tl.float32)
        out += g_slc[:, None] * tl.load(slc_ptr + at, mask=row_ok[:, None], other=0.0).to(tl.float32)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit(do_not_specialize=["num_tokens", "token_offset", "window"])
def _forward(
    q_ptr, k1_desc, k2_desc, v1_desc, v2_desc, position_ptr, o_ptr, lse_ptr, out_ptr, cmp_ptr, slc_ptr, gates_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_gt, stride_gh,
    num_tokens, token_offset, window, factor,
    GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    local, head, token, start, row_ok, begin, blocks, whole, whole_end = row_tile(
        position_ptr, num_tokens, token_offset, window, GROUP, BLOCK_M, BLOCK_N
    )
    q_base = q_ptr + (local * stride_qt + head * stride_qh)[:, None]
    q1 = tl.load(q_base + tl.arange(0, D1)[None, :])
    q2 = q1
    if D2 > 0:
        q2 = tl.load(q_base + D1 + tl.arange(0, D2)[None, :])
    top = tl.full([BLOCK_M], -1e38, tl.float32)  # finite: a hidden block gives exp2(-inf) = 0, not NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, E2 if E2 > 0 else 1], tl.float32)
    acc1, acc2, top, total = _sweep(
        acc1, acc2, top, total, q1, q2, k1_desc, k2_desc, v1_desc, v2_desc, kv_head, begin, blocks, whole, whole_end,
        start, token, factor, D1, D2, E1, E2, BLOCK_N,
    )  # fmt: skip

    tl.store(lse_ptr + local * stride_lt + head, (top + tl.log2(total)) * 0.6931471805599453, mask=row_ok)
    inverse = 1.0 / total
    g_cmp = inverse
    g_slc = inverse
    g_win = inverse
    if COMBINE:
        gate = gates_ptr + local * stride_gt + head * stride_gh
        g_cmp = tl.load(gate).to(tl.float32)
        g_slc = tl.load(gate + 1).to(tl.float32)
        g_win = tl.load(gate + 2).to(tl.float32)
    _finish(
        acc1 * inverse[:, None], tl.arange(0, E1), row_ok, local, head, o_ptr, out_ptr, cmp_ptr, slc_ptr,
        g_cmp, g_slc, g_win, stride_ot, stride_oh, KEEP, COMBINE,
    )  # fmt: skip
    if E2 > 0:
        _finish(
            acc2 * inverse[:, None], E1 + tl.arange(0, E2), row_ok, local, head, o_ptr, out_ptr, cmp_ptr, slc_ptr,
            g_cmp, g_slc, g_win, stride_ot, stride_oh, KEEP, COMBINE,
        )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window_size: int, scale: float, first_token: int,
    tile: Tile | None, o: Tensor | None, lse: Tensor, gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> None:
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k.shape[1], v.shape[2]
    if tokens == 0:
        return
    if tile is None and serves(q, kv_heads, d_v) and (gated[3] if o is None else o).is_contiguous():
        here = Packing(packing.cu_seqlens, packing.doc, packing.position[first_token:], packing.max_seqlen)
        attend(
            q, k, v, here, o, lse, scale=scale, window=min(window_size, k.shape[0]), first_token=first_token, gated=gated
        )
        return
    tile = tile or forward_tile(d_qk, d_v, q.dtype)
    (d1, d2), (e1, e2) = split_dim(d_qk), split_dim(d_v)
    group = heads // kv_heads
    o_cmp, o_slc, gates, out = gated or (q, q, lse, o)
    written = out if o is None else o
    _forward[(triton.cdiv(tokens * group, tile.block_m), kv_heads)](
        q, *head_descriptors(k, tile.block_n), *head_descriptors(v, tile.block_n), packing.position[first_token:],
        written, lse, out, o_cmp, o_slc, gates, q.stride(0), q.stride(1), written.stride(0), written.stride(1),
        lse.stride(0), gates.stride(0), gates.stride(1), tokens, first_token, min(window_size, k.shape[0]),
        scale * math.log2(math.e),
        GROUP=group, D1=d1, D2=d2, E1=e1, E2=e2, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        KEEP=o is not None, COMBINE=gated is not None, **tile.options,
    )  # fmt: skip


def window_attention_fwd(
    q: Tensor, k_win: Tensor, v_win: Tensor, packing: Packing, window_size: int, *, scale: float, first_token: int = 0,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last window_size tokens of the document, the query's own included; no autograd.

    q [n, H, Dqk]: the queries of tokens first_token .. first_token + n; k_win [T, Hkv, Dqk], v_win [T, Hkv, Dv].
    Returns o [n, H, Dv] in q's dtype and lse [n, H] in fp32 (natural log).
    """
    q = unit_stride(q)
    o = q.new_empty(*q.shape[:2], v_win.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    _launch(q, k_win, v_win, packing, window_size, scale, first_token, tile, o, lse, None)
    return o, lse


def window_attention_combine(
    q: Tensor, k_win: Tensor, v_win: Tensor, packing: Packing, window_size: int, o_cmp: Tensor, o_slc: Tensor,
    gates: Tensor, out: Tensor, o_win: Tensor | None, lse: Tensor, *, scale: float, first_token: int = 0,
    tile: Tile | None = None,
) -> None:
    """Window attention with equation 5 in its epilogue, so that o_win reaches memory only where it is asked for.

    As window_attention_fwd, with the other branches' outputs o_cmp, o_slc [n, H, Dv] and gates [n, H, 3] of the same
    queries (compression, selection, window). Writes out [n, H, Dv], lse fp32 [n, H] and, unless None, o_win [n, H, Dv];
    out, o_win, o_cmp and o_slc must have equal strides.
    """
    q, gates = unit_stride(q), unit_stride(gates)
    gated = (o_cmp, o_slc, gates, out)
    _launch(q, k_win, v_win, packing, window_size, scale, first_token, tile, o_win, lse, gated)
