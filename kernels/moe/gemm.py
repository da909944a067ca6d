"""Grouped matrix products over rows sorted by expert, the gather of a product's rows fused into its loads.

`rows_times_weights` is the forward and the gradient of rows (one weight matrix a tile of rows: whole tiles belong to one
expert); `rows_times_rows` the gradient of weights (a sum over each expert's rows, in their order: no atomics). A row's
result depends on that row and its expert alone, not on what else lies in its tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = 128  # rows of one expert are padded to a multiple of this: a tile of rows has one expert


@dataclass(frozen=True)
class Tile:
    """Sides of a program's output and the depth of a step; what Triton is told beside them."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def rows_tile(columns: int, dtype: torch.dtype) -> Tile:
    """For rows_times_weights: 128 x 256 outputs keep two warpgroups' registers full."""
    if dtype == torch.float32:
        return Tile(TILE, 64, 32, 8, 2)
    return Tile(TILE, 256, 64, 8, 3) if _fills_256(columns) else Tile(TILE, 128, 64, 8, 4)


def _fills_256(columns: int) -> bool:
    """Whether tiles of 256 columns leave less than 128 of them idle."""
    return columns % 256 == 0 or columns % 256 > 128


def weights_tile(columns: int, dtype: torch.dtype) -> Tile:
    """For rows_times_rows; k divides TILE, so that no step crosses into another expert's rows."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 8, 2)
    # A row's load waits for its index, so that five stages keep three steps' tiles in shared memory.
    return Tile(128, 256, 64, 8, 5) if _fills_256(columns) else Tile(128, 128, 64, 8, 5)


@triton.jit
def expert_of(ends_ptr, row, EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """How many experts end at or before `row`: the number of the one whose row it is."""
    number = tl.arange(0, WIDTH)
    end = tl.load(ends_ptr + number, mask=number < EXPERTS, other=2147483647)
    return tl.sum((end <= row).to(tl.int32), 0)


@triton.jit(do_not_specialize=["tokens"])
def _rows(
    a_ptr, index_ptr, b_desc, ends_ptr, out_ptr, tokens,
    N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // columns * BLOCK_M
    if first < tl.load(ends_ptr + EXPERTS - 1):
        n = tl.program_id(0) % columns * BLOCK_N
        expert = expert_of(ends_ptr, first, EXPERTS, WIDTH)
        row = first + tl.arange(0, BLOCK_M)
        depth = tl.arange(0, BLOCK_K)
        source = row
        if GATHER:
            source = tl.load(index_ptr + row)
        a = a_ptr + source.to(tl.int64)[:, None] * K + depth[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            ok = (depth < K - k)[None, :]
            if GATHER:
                ok = ok & (source < tokens)[:, None]
            left = tl.load(a + k, mask=ok, other=0.0)
            if TRANSPOSED:  # b [E * N, K]
                right = tl.trans(b_desc.load([expert * N + n, k]))
            else:  # b [E * K, N]
                right = b_desc.load([expert * K + k, n])
            acc = tl.dot(left, right, acc, input_precision="ieee")
        column = n + tl.arange(0, BLOCK_N)
        out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(column < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _weights(
    a_ptr, a_index_ptr, b_ptr, b_index_ptr, ends_ptr, out_ptr, tokens,
    M: tl.constexpr, N: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        a_row = row
        a_ok = (m < M)[None, :]
        if GATHER_A:
            a_row = tl.load(a_index_ptr + row)
            a_ok = a_ok & (a_row < tokens)[:, None]
        b_row = row
        b_ok = (n < N)[None, :]
        if GATHER_B:
            b_row = tl.load(b_index_ptr + row)
            b_ok = b_ok & (b_row < tokens)[:, None]
        a = tl.load(a_ptr + a_row.to(tl.int64)[:, None] * M + m[None, :], mask=a_ok, other=0.0)  # [BLOCK_K, BLOCK_M]
        b = tl.load(b_ptr + b_row.to(tl.int64)[:, None] * N + n[None, :], mask=b_ok, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    out = out_ptr + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def rows_times_weights(
    a: Tensor, b: Tensor, ends: Tensor, *, transposed: bool, index: Tensor | None = None, rows: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """a [R, K] times each row's expert: b [E, N, K] transposed, or [E, K, N] as it is -> [R, N] in a's dtype.

    ends int32 [E], multiples of TILE: rows from ends[-1] on are neither read nor written. index int32 [R] (give rows=R):
    a is [T, K] and row r of the product's left side a[index[r]], 0 where index[r] is T. K and N are multiples of 8.
    """
    experts, n, depth = b.shape if transposed else (b.shape[0], b.shape[2], b.shape[1])
    count = a.shape[0] if rows is None else rows
    tile = tile or rows_tile(n, a.dtype)
    a, b = a.contiguous(), b.contiguous()
    flat = b.view(-1, b.shape[2])
    box = [tile.n, tile.k] if transposed else [tile.k, tile.n]
    out = torch.empty(count, n, dtype=a.dtype, device=a.device)
    _rows[(triton.cdiv(count, tile.m) * triton.cdiv(n, tile.n),)](
        a, ends if index is None else index, TensorDescriptor(flat, list(flat.shape), [flat.shape[1], 1], box), ends, out,
        a.shape[0], N=n, K=depth, EXPERTS=experts, WIDTH=triton.next_power_of_2(experts), GATHER=index is not None,
        TRANSPOSED=transposed, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.options,
    )  # fmt: skip
    return out


def rows_times_rows(
    a: Tensor, b: Tensor, ends: Tensor, *, a_index: Tensor | None = None, b_index: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The sum over each expert's rows r of a[r]^T b[r]: a [R, M], b [R, N] -> [E, M, N] in a's dtype.

    a_index or b_index int32 [R]: that side is [T, ...] and its row r is row index[r], 0 where that is T.
    """
    experts, (m, n) = ends.numel(), (a.shape[1], b.shape[1])
    tile = tile or weights_tile(n, a.dtype)
    a, b = a.contiguous(), b.contiguous()
    tokens = (a if a_index is not None else b).shape[0]
    out = torch.empty(experts, m, n, dtype=a.dtype, device=a.device)
    _weights[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), experts)](
        a, ends if a_index is None else a_index, b, ends if b_index is None else b_index, ends, out, tokens,
        M=m, N=n, GATHER_A=a_index is not None, GATHER_B=b_index is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.options,
    )  # fmt: skip
    return out
