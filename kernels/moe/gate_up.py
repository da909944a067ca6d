"""The first product of the experts with its rows gathered in the loads and SwiGLU, weighted, in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sieve.kernels.moe.gemm import TILE, Tile, expert_of


def gate_up_tile(dtype: torch.dtype) -> Tile:
    """n columns of gate and as many of up: two accumulators as large as one of rows_times_weights' together."""
    return Tile(TILE, 32, 32, 8, 2) if dtype == torch.float32 else Tile(TILE, 128, 64, 8, 3)


@triton.jit(do_not_specialize=["tokens"])
def _gate_up(
    x_ptr, index_ptr, w_desc, scale_ptr, ends_ptr, h_ptr, inner_ptr, tokens,
    SIZE: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // columns * BLOCK_M
    if first < tl.load(ends_ptr + EXPERTS - 1):
        n = tl.program_id(0) % columns * BLOCK_N
        at = expert_of(ends_ptr, first, EXPERTS, WIDTH) * (2 * SIZE) + n
        row = first + tl.arange(0, BLOCK_M)
        depth = tl.arange(0, BLOCK_K)
        source = tl.load(index_ptr + row)
        x = x_ptr + source.to(tl.int64)[:, None] * K + depth[None, :]
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            left = tl.load(x + k, mask=(depth < K - k)[None, :] & (source < tokens)[:, None], other=0.0)
            gate = tl.dot(left, tl.trans(w_desc.load([at, k])), gate, input_precision="ieee")
            up = tl.dot(left, tl.trans(w_desc.load([at + SIZE, k])), up, input_precision="ieee")
        column = n + tl.arange(0, BLOCK_N)
        ok = (column < SIZE)[None, :]
        h = h_ptr + row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
        low_gate = gate.to(h_ptr.dtype.element_ty)  # the backward starts from what is kept, so this does too
        low_up = up.to(h_ptr.dtype.element_ty)
        tl.store(h, low_gate, mask=ok)
        tl.store(h + SIZE, low_up, mask=ok)
        gate = low_gate.to(tl.float32)
        inner = gate / (1 + tl.exp(-gate)) * low_up.to(tl.float32) * tl.load(scale_ptr + row)[:, None]
        out = inner_ptr + row.to(tl.int64)[:, None] * SIZE + column[None, :]
        tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=ok)


def gate_up_swiglu(
    x: Tensor, gate_up: Tensor, source: Tensor, scale: Tensor, ends: Tensor, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, K], gate_up [E, 2 * size, K], source int32 and scale fp32 [R], ends int32 [E] as sieve.kernels.moe.sort makes
    them for TILE -> h [R, 2 * size], the product, and silu(gate) * up * scale [R, size]; neither past ends[-1]."""
    (experts, double, depth), rows = gate_up.shape, source.numel()
    size, tile = double // 2, tile or gate_up_tile(x.dtype)
    x, flat = x.contiguous(), gate_up.contiguous().view(-1, depth)
    h = torch.empty(rows, double, dtype=x.dtype, device=x.device)
    inner = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    _gate_up[(triton.cdiv(rows, tile.m) * triton.cdiv(size, tile.n),)](
        x, source, TensorDescriptor(flat, list(flat.shape), [depth, 1], [tile.n, tile.k]), scale, ends, h, inner,
        x.shape[0], SIZE=size, K=depth, EXPERTS=experts, WIDTH=triton.next_power_of_2(experts),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.options,
    )  # fmt: skip
    return h, inner
