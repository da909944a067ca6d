"""Several linear layers of a few tokens in one launch, and SwiGLU's first half in another: products bound by reading weights.

A step of decoding has so few rows that a product takes about as long as its launch. Here one launch's programs share out
the rows of all weights, fp32 sums are rounded once, and intermediate results where PyTorch rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.launch import after_earlier, overlap_options, overlaps

MOST_LAYERS = 8


@triton.jit
def _product(
    x_ptr, w_ptr, tokens, unit, units, HIDDEN: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """x w^T, fp32 [ROWS, UNITS], for int [UNITS] `unit` of the weight's `units` rows; x [tokens, HIDDEN]."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, UNITS], tl.float32)
    for begin in range(0, HIDDEN, STEP):
        column = (begin + tl.arange(0, STEP))[None, :]
        x = tl.load(x_ptr + row * HIDDEN + column, mask=(row < tokens) & (column < HIDDEN), other=0.0)
        at = w_ptr + unit.to(tl.int64)[:, None] * HIDDEN + column
        w = tl.load(at, mask=(unit < units)[:, None] & (column < HIDDEN), other=0.0)
        total = tl.dot(x, w.T, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["tokens"])
def _project(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, w6_ptr, w7_ptr, out_ptr, tokens,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    N6: tl.constexpr, N7: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weight i [Ni, HIDDEN]; its result [tokens, Ni] begins where those before, their Ni in whole UNITS, end."""
    program = tl.program_id(0)
    after_earlier(OVERLAP)
    w_ptr, units, first = w0_ptr, N0, 0
    end = (N0 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w1_ptr, N1, end
    end += (N1 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w2_ptr, N2, end
    end += (N2 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w3_ptr, N3, end
    end += (N3 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w4_ptr, N4, end
    end += (N4 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w5_ptr, N5, end
    end += (N5 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w6_ptr, N6, end
    end += (N6 + UNITS - 1) // UNITS
    if program >= end:
        w_ptr, units, first = w7_ptr, N7, end
    unit = (program - first) * UNITS + tl.arange(0, UNITS)
    total = _product(x_ptr, w_ptr, tokens, unit, units, HIDDEN, ROWS, STEP, UNITS)
    row = tl.arange(0, ROWS)[:, None]
    to = out_ptr + first * UNITS * tokens + row * units + unit[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=(row < tokens) & (unit < units)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _swiglu(
    x_ptr, gate_ptr, up_ptr, out_ptr, tokens, N: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    UNITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weights [N, HIDDEN], out [tokens, N]."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    after_earlier(OVERLAP)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = _product(x_ptr, gate_ptr, tokens, unit, N, HIDDEN, ROWS, STEP, UNITS).to(dtype).to(tl.float32)
    up = _product(x_ptr, up_ptr, tokens, unit, N, HIDDEN, ROWS, STEP, UNITS).to(dtype).to(tl.float32)
    inner = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    row = tl.arange(0, ROWS)[:, None]
    tl.store(out_ptr + row * N + unit[None, :], inner.to(dtype), mask=(row < tokens) & (unit < N)[None, :])


def _tile(x: Tensor) -> int:
    """Rows of x, padded, and of a weight that a program takes: as many, so that no more of x is read than of weights."""
    return max(16, triton.next_power_of_2(x.shape[0]))


def _options(x: Tensor, programs: int) -> dict[str, int]:
    rows = _tile(x)
    step = 4096 // rows // (2 if x.dtype == torch.float32 else 1)
    overlap = overlaps(programs, x.device)
    return {
        "HIDDEN": x.shape[1], "ROWS": rows, "STEP": step, "UNITS": rows, "OVERLAP": overlap, "num_warps": 4, "num_stages": 4,
        **overlap_options(overlap),
    }  # fmt: skip


def project(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x [T, in] of few tokens; up to MOST_LAYERS weights [out, in] of its dtype -> x w^T [T, out] each, contiguous."""
    x, weights = x.contiguous(), [w.contiguous() for w in weights]
    tokens, sizes, units = x.shape[0], [w.shape[0] for w in weights], _tile(x)
    padded = [triton.cdiv(n, units) * units for n in sizes]
    out = x.new_empty(tokens * sum(padded))
    missing = MOST_LAYERS - len(weights)
    counts = {f"N{i}": n for i, n in enumerate(sizes + [0] * missing)}
    programs = sum(padded) // units
    _project[(programs,)](x, *weights, *weights[:1] * missing, out, tokens, **counts, **_options(x, programs))
    parts = out.split([tokens * n for n in padded])
    return tuple(part[: tokens * n].view(tokens, n) for part, n in zip(parts, sizes))


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """x [T, in] of few tokens, weights [n, in] of its dtype -> silu(x gate^T) * (x up^T) [T, n]."""
    x, n = x.contiguous(), gate.shape[0]
    out, programs = x.new_empty(x.shape[0], n), triton.cdiv(n, _tile(x))
    _swiglu[(programs,)](x, gate.contiguous(), up.contiguous(), out, x.shape[0], N=n, **_options(x, programs))
    return out
