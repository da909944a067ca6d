"""Rotary position embedding of several tensors at the same positions in one launch, to the bit as PyTorch's on a GPU.

In PyTorch (sieve.model.rope) a rotation takes four launches a tensor. Equal bits matter since inference takes this and training
that: a rotation's result must not depend on whether its gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.launch import after_earlier, overlap_options, overlaps, unit_stride

MOST_TENSORS = 3
PAIRS = 2048  # pairs of elements that a program turns


@triton.jit
def turned(first, second, cos, sin):
    """fp32 halves turned, rounded where torch.addcmul (2.11 on) on CUDA rounds: after each product, but for that of value=1,
    which is fused with the sum. What calls this is launched with enable_fp_fusion=False, so that no other product is."""
    return first * cos - second * sin, tl.fma(first, sin, second * cos)


@triton.jit
def _turn_rows(
    x_ptr, out_ptr, cos_ptr, sin_ptr, program, rows, stride_t, stride_h,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The program's of the `rows` (token, head) of one tensor."""
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDE)[None, :]
    ok = (row < rows) & (column < HALF)
    token = (row // HEADS).to(tl.int64)
    at = x_ptr + token * stride_t + row % HEADS * stride_h + column
    first = tl.load(at, mask=ok).to(tl.float32)
    second = tl.load(at + HALF, mask=ok).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + column, mask=ok)
    sin = tl.load(sin_ptr + token * HALF + column, mask=ok)
    first, second = turned(first, second, cos, sin)
    to = out_ptr + row.to(tl.int64) * (2 * HALF) + column
    tl.store(to, first.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(to + HALF, second.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "end0", "end1"])
def _rotate(
    x0_ptr, x1_ptr, x2_ptr, out0_ptr, out1_ptr, out2_ptr, cos_ptr, sin_ptr, tokens, end0, end1,
    stride_t0, stride_h0, stride_t1, stride_h1, stride_t2, stride_h2,
    HEADS0: tl.constexpr, HEADS1: tl.constexpr, HEADS2: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs before end0 turn the first tensor, those before end1 the second."""
    program = tl.program_id(0)
    after_earlier(OVERLAP)
    if program < end0:
        _turn_rows(x0_ptr, out0_ptr, cos_ptr, sin_ptr, program, tokens * HEADS0, stride_t0, stride_h0, HEADS0, HALF, WIDE, ROWS)
    elif program < end1:
        program -= end0
        _turn_rows(x1_ptr, out1_ptr, cos_ptr, sin_ptr, program, tokens * HEADS1, stride_t1, stride_h1, HEADS1, HALF, WIDE, ROWS)
    else:
        program -= end1
        _turn_rows(x2_ptr, out2_ptr, cos_ptr, sin_ptr, program, tokens * HEADS2, stride_t2, stride_h2, HEADS2, HALF, WIDE, ROWS)


def rotate(xs: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Up to MOST_TENSORS tensors x [T, heads, D], of any number of heads each but one D and dtype (fp32, bf16 or fp16), turned
    by cos and sin fp32 [T, 1, D // 2], in contiguous memory of their own. No gradient."""
    xs = [unit_stride(x) for x in xs]
    outs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs)
    tokens, half = xs[0].shape[0], xs[0].shape[2] // 2
    wide = triton.next_power_of_2(half)
    rows = max(1, PAIRS // wide)
    programs = [triton.cdiv(tokens * x.shape[1], rows) for x in xs]
    if not sum(programs):
        return outs
    # Of tensors that are not there no program is.
    missing = MOST_TENSORS - len(xs)
    every, out = [*xs, *xs[:1] * missing], [*outs, *outs[:1] * missing]
    end0 = programs[0]
    end1 = end0 + sum(programs[1:2])
    overlap = overlaps(sum(programs), xs[0].device)
    _rotate[(sum(programs),)](
        *every, *out, cos.contiguous(), sin.contiguous(), tokens, end0, end1, *(s for x in every for s in x.stride()[:2]),
        HEADS0=every[0].shape[1], HEADS1=every[1].shape[1], HEADS2=every[2].shape[1], HALF=half, WIDE=wide, ROWS=rows,
        OVERLAP=overlap, num_warps=4, enable_fp_fusion=False, **overlap_options(overlap),
    )  # fmt: skip
    return outs
