"""Sliding-window attention as a PyTorch operator: the window branch alone, and layers of window or full attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.launch import unit_stride
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.window_bwd import window_dkv, window_dq
from sieve.kernels.nsa.window_fwd import window_attention_fwd


@triton.jit(do_not_specialize=["rows"])
def _delta(
    o_ptr, do_ptr, delta_ptr, stride_dt, stride_dh, rows,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    ok = row < rows
    inside = ok[:, None] & (column < D)[None, :]
    o = tl.load(o_ptr + row.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0)
    do_at = ((row // HEADS).to(tl.int64) * stride_dt + row % HEADS * stride_dh)[:, None] + column[None, :]
    do = tl.load(do_ptr + do_at, mask=inside, other=0.0)
    tl.store(delta_ptr + row, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=ok)


@torch.library.custom_op("sieve::window_forward", mutates_args=())
def window_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc: Tensor, position: Tensor, max_seqlen: int, window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [T, H, Dv] and lse fp32 [T, H]."""
    return window_attention_fwd(q, k, v, Packing(cu_seqlens, doc, position, max_seqlen), window_size, scale=scale)


@window_forward.register_fake
def _(q, k, v, cu_seqlens, doc, position, max_seqlen, window_size, scale):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("sieve::window_backward", mutates_args=())
def window_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, doc: Tensor, position: Tensor,
    max_seqlen: int, window_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    packing = Packing(cu_seqlens, doc, position, max_seqlen)
    (tokens, heads, d), do, delta, block = o.shape, unit_stride(do), torch.empty_like(lse), 32
    if tokens:
        _delta[(triton.cdiv(tokens * heads, block),)](
            o, do, delta, do.stride(0), do.stride(1), tokens * heads,
            HEADS=heads, D=d, WIDTH=triton.next_power_of_2(d), BLOCK=block,
        )  # fmt: skip
    arguments = do, q, k, v, lse, delta, packing, window_size
    return window_dq(*arguments, scale=scale), *window_dkv(*arguments, scale=scale)


@window_backward.register_fake
def _(q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, max_seqlen, window_size, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (max_seqlen, window_size, scale)


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 9
    q, k, v, *packing, o, lse = ctx.saved_tensors
    return *window_backward(q, k, v, do, o, lse, *packing, *ctx.settings), *(None,) * 6


window_forward.register_autograd(_backward, setup_context=_setup_context)


def window_attention(
    q: Tensor, k_win: Tensor, v_win: Tensor, packing: Packing, window_size: int | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the last window_size tokens of the document, the query's own included; None: over all before it.

    q [T, H, Dqk], k_win [T, Hkv, Dqk], v_win [T, Hkv, Dv] of one dtype (bf16, fp16, fp32), query head h reading KV head
    h // (H // Hkv) -> o [T, H, Dv] in q's dtype, differentiable, and lse fp32 [T, H] (natural log), which is not.
    Raises ValueError where scale or window_size is not positive or a head dimension has no kernel.
    """
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive; usually it is 1 / sqrt(head_dim_qk)")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least 1, the query's own token")
    width = packing.max_seqlen if window_size is None else window_size
    return window_forward(
        q, k_win, v_win, packing.cu_seqlens, packing.doc, packing.position, packing.max_seqlen, width, scale
    )
