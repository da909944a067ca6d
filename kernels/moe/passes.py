"""What lies between the grouped products, one pass over memory each: the copies to rows and back, and weighted SwiGLU.

Rows past ends[-1] hold nothing: they are neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_rows(x_ptr, source_ptr, out_ptr, tokens, D: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    token = tl.load(source_ptr + row)
    value = tl.load(x_ptr + token.to(tl.int64) * D + column, mask=(column < D) & (token < tokens), other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * D + column, value, mask=column < D)


@triton.jit
def _sum_routes(y_ptr, slot_ptr, out_ptr, D: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for j in tl.static_range(TOP_K):
        place = tl.load(slot_ptr + token * TOP_K + j).to(tl.int64)
        total += tl.load(y_ptr + place * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _swiglu(
    h_ptr, scale_ptr, ends_ptr, inner_ptr, last, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < tl.load(ends_ptr + last):
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        ok = (row < tl.load(ends_ptr + last))[:, None] & (column < SIZE)[None, :]
        at = row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
        gate = tl.load(h_ptr + at, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + at + SIZE, mask=ok, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < tl.load(ends_ptr + last), other=0.0)
        inner = gate / (1 + tl.exp(-gate)) * up * scale[:, None]
        out = row.to(tl.int64)[:, None] * SIZE + column[None, :]
        tl.store(inner_ptr + out, inner.to(inner_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_backward(
    dinner_ptr, h_ptr, scale_ptr, ends_ptr, inner_ptr, dh_ptr, dscale_ptr, last,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A row's whole width in one program, for the sum that is its weight's gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < tl.load(ends_ptr + last):
        row_ok = row < tl.load(ends_ptr + last)
        scale = tl.load(scale_ptr + row, mask=row_ok, other=0.0)[:, None]
        dscale = tl.zeros([ROWS], tl.float32)
        for start in tl.static_range(0, SIZE, WIDTH):
            column = start + tl.arange(0, WIDTH)
            ok = row_ok[:, None] & (column < SIZE)[None, :]
            at = row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
            out = row.to(tl.int64)[:, None] * SIZE + column[None, :]
            gate = tl.load(h_ptr + at, mask=ok, other=0.0).to(tl.float32)
            up = tl.load(h_ptr + at + SIZE, mask=ok, other=0.0).to(tl.float32)
            dinner = tl.load(dinner_ptr + out, mask=ok, other=0.0).to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-gate))
            silu = gate * sigmoid
            dscale += tl.sum(dinner * silu * up, 1)
            tl.store(inner_ptr + out, (silu * up * scale).to(inner_ptr.dtype.element_ty), mask=ok)
            dinner *= scale
            dgate = dinner * up * (sigmoid + silu * (1 - sigmoid))
            tl.store(dh_ptr + at, dgate.to(dh_ptr.dtype.element_ty), mask=ok)
            tl.store(dh_ptr + at + SIZE, (dinner * silu).to(dh_ptr.dtype.element_ty), mask=ok)
        tl.store(dscale_ptr + row, dscale, mask=row_ok)


def _width(size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(size))


def copy_rows(x: Tensor, source: Tensor) -> Tensor:
    """x [T, D], source int32 [R] -> [R, D]: row source[r] of x, 0 where that is T."""
    (tokens, d), rows = x.shape, source.shape[0]
    out = torch.empty(rows, d, dtype=x.dtype, device=x.device)
    width = _width(d, 1024)
    _copy_rows[(rows, triton.cdiv(d, width))](x, source, out, tokens, D=d, WIDTH=width, num_warps=4)
    return out


def sum_routes(y: Tensor, slot: Tensor, top_k: int) -> Tensor:
    """y [R, D], slot int32 [T * k] -> [T, D]: the sum of each token's rows, in the order of its routes, in fp32."""
    tokens, d = slot.numel() // top_k, y.shape[1]
    out = torch.empty(tokens, d, dtype=y.dtype, device=y.device)
    width = _width(d, 1024)
    _sum_routes[(tokens, triton.cdiv(d, width))](y, slot, out, D=d, TOP_K=top_k, WIDTH=width, num_warps=4)
    return out


def swiglu(h: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """h [R, 2 * size] (gate, then up), scale fp32 [R], ends int32 [E] -> silu(gate) * up * scale [R, size]."""
    rows, size = h.shape[0], h.shape[1] // 2
    inner = torch.empty(rows, size, dtype=h.dtype, device=h.device)
    width = _width(size, 256)
    block = max(1, 2048 // width)
    _swiglu[(triton.cdiv(rows, block), triton.cdiv(size, width))](
        h, scale, ends, inner, ends.numel() - 1, SIZE=size, WIDTH=width, ROWS=block, num_warps=4
    )
    return inner


def swiglu_backward(dinner: Tensor, h: Tensor, scale: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dinner [R, size] and swiglu's arguments -> its value again [R, size], dh [R, 2 * size], dscale fp32 [R]."""
    rows, size = dinner.shape
    inner, dh = torch.empty_like(dinner), torch.empty_like(h)
    dscale = torch.empty(rows, dtype=torch.float32, device=h.device)
    width = _width(size, 256)
    block = max(1, 2048 // width)
    _swiglu_backward[(triton.cdiv(rows, block),)](
        dinner, h, scale, ends, inner, dh, dscale, ends.numel() - 1, SIZE=size, WIDTH=width, ROWS=block, num_warps=4
    )
    return inner, dh, dscale
