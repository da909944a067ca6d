"""The gated sum of the branches (equation 5): its value, and its backward in one pass over the branches' outputs.

A branch's backward needs dO_i = g_i * dO and delta_i = sum(o_i * dO_i) only inside P_i * dO_i and P_i * (dO_i v^T -
delta_i), where P_i = exp(s - lse_i). There g_i moves into the exponent: with lse_i - log g_i for lse_i, the ungated dO
and sum(o_i * dO) give the same products. That sum is the gate's own gradient, so one pass serves both, no gated copy of
dO is stored, and none is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import unit_stride


@triton.jit(do_not_specialize=["rows"])
def _combine(
    cmp_ptr, slc_ptr, win_ptr, gates_ptr, out_ptr, stride_gt, stride_gh, rows,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    ok = row < rows
    inside = ok[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    gate = gates_ptr + (row // HEADS).to(tl.int64) * stride_gt + row % HEADS * stride_gh
    g_cmp = tl.load(gate, mask=ok, other=0.0).to(tl.float32)[:, None]
    g_slc = tl.load(gate + 1, mask=ok, other=0.0).to(tl.float32)[:, None]
    g_win = tl.load(gate + 2, mask=ok, other=0.0).to(tl.float32)[:, None]
    out = g_cmp * tl.load(cmp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out += g_slc * tl.load(slc_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out += g_win * tl.load(win_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _branch(o_ptr, at, do, inside, gate_ptr, lse_ptr, delta_ptr, shifted_ptr, dgate_ptr, row, ok):
    """One branch: its gate's gradient, which is its delta, and its shifted lse."""
    delta = tl.sum(tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32) * do, 1)
    tl.store(delta_ptr + row, delta, mask=ok)
    tl.store(dgate_ptr, delta.to(dgate_ptr.dtype.element_ty), mask=ok)
    gate = tl.load(gate_ptr, mask=ok, other=1.0).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=ok, other=0.0)
    # A row that saw no key keeps -inf; a gate of 0 gives +inf, hence weights of 0.
    shifted = tl.where(lse == float("-inf"), lse, lse - tl.log(gate))
    tl.store(shifted_ptr + row, shifted, mask=ok)


@triton.jit(do_not_specialize=["rows"])
def _combine_backward(
    do_ptr, cmp_ptr, slc_ptr, win_ptr, gates_ptr, lse_cmp_ptr, lse_slc_ptr, lse_win_ptr,
    dgates_ptr, delta_cmp_ptr, delta_slc_ptr, delta_win_ptr, shifted_cmp_ptr, shifted_slc_ptr, shifted_win_ptr,
    stride_dt, stride_dh, stride_gt, stride_gh, rows,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    ok = row < rows
    inside = ok[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    token = (row // HEADS).to(tl.int64)
    head = row % HEADS
    do_at = (token * stride_dt + head * stride_dh)[:, None] + column[None, :]
    do = tl.load(do_ptr + do_at, mask=inside, other=0.0).to(tl.float32)
    gate = gates_ptr + token * stride_gt + head * stride_gh
    dgate = dgates_ptr + row.to(tl.int64) * 3
    _branch(cmp_ptr, at, do, inside, gate, lse_cmp_ptr, delta_cmp_ptr, shifted_cmp_ptr, dgate, row, ok)
    _branch(slc_ptr, at, do, inside, gate + 1, lse_slc_ptr, delta_slc_ptr, shifted_slc_ptr, dgate + 1, row, ok)
    _branch(win_ptr, at, do, inside, gate + 2, lse_win_ptr, delta_win_ptr, shifted_win_ptr, dgate + 2, row, ok)


def _width(d: int) -> int:
    """Columns of a row's tile: all of d at once, since the sum over them is taken in one piece."""
    return triton.next_power_of_2(sum(split_dim(d)))


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Equation 5, summed in fp32: contiguous outputs [T, H, Dv] and gates [T, H, 3] -> [T, H, Dv]; no autograd."""
    (tokens, heads, d), block = o_cmp.shape, 32
    out, gates = torch.empty_like(o_cmp), unit_stride(gates)
    if tokens:
        _combine[(triton.cdiv(tokens * heads, block),)](
            o_cmp, o_slc, o_win, gates, out, gates.stride(0), gates.stride(1), tokens * heads,
            HEADS=heads, D=d, WIDTH=_width(d), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def combine_backward(
    do: Tensor, outputs: tuple[Tensor, Tensor, Tensor], gates: Tensor, lse: tuple[Tensor, Tensor, Tensor],
    dgates: Tensor, deltas: tuple[Tensor, Tensor, Tensor], shifted: tuple[Tensor, Tensor, Tensor],
) -> None:
    """What the backward of `combine` and of the three branches needs, in one pass over their outputs.

    do [n, H, Dv]; outputs, contiguous [n, H, Dv]; gates [n, H, 3]; lse, fp32 contiguous [n, H]. Writes dgates,
    contiguous [n, H, 3]; deltas = sum(o_i * do) and shifted = lse_i - log g_i, fp32 contiguous [n, H]: with do, deltas
    and shifted in the places of dO, delta and lse, a branch's backward gives the gradients through its gate.
    """
    (tokens, heads, d), block = do.shape, 32
    do, gates = unit_stride(do), unit_stride(gates)
    if tokens:
        _combine_backward[(triton.cdiv(tokens * heads, block),)](
            do, *outputs, gates, *lse, dgates, *deltas, *shifted,
            do.stride(0), do.stride(1), gates.stride(0), gates.stride(1), tokens * heads,
            HEADS=heads, D=d, WIDTH=_width(d), BLOCK=block, num_warps=4,
        )  # fmt: skip
