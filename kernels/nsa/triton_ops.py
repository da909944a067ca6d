"""Native Sparse Attention's Triton kernels as PyTorch operators, one forward and one backward.

Autograd, torch.compile, activation checkpointing and CUDA graphs see opaque calls with known shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.nsa import autograd
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing

INPUTS = 8  # differentiable inputs, which stand first in both operators' arguments


@torch.library.custom_op("sieve::nsa_forward", mutates_args=())
def nsa_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    cu_seqlens: Tensor, doc: Tensor, position: Tensor, max_seqlen: int, geometry: list[int], scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, indices, lse of (compression, selection, window), and their outputs: empty unless `keep`."""
    out, indices, lse, outputs = autograd.forward(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, Packing(cu_seqlens, doc, position, max_seqlen),
        Geometry(*geometry), scale=scale, keep=keep,
    )
    return out, indices, *lse, *(outputs or (q.new_empty(0) for _ in range(3)))


@nsa_forward.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, doc, position, max_seqlen, geometry, scale, keep):
    (tokens, heads, _), kv_heads, d_v = q.shape, v_slc.shape[1], v_slc.shape[2]
    out = q.new_empty(tokens, heads, d_v)
    indices = q.new_empty(tokens, kv_heads, Geometry(*geometry).topk, dtype=torch.int32)
    lse = (q.new_empty(tokens, heads, dtype=torch.float32) for _ in range(3))
    return out, indices, *lse, *(torch.empty_like(out) if keep else q.new_empty(0) for _ in range(3))


@torch.library.custom_op("sieve::nsa_backward", mutates_args=())
def nsa_backward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    do: Tensor, indices: Tensor, lse_cmp: Tensor, lse_slc: Tensor, lse_win: Tensor,
    o_cmp: Tensor, o_slc: Tensor, o_win: Tensor,
    cu_seqlens: Tensor, doc: Tensor, position: Tensor, max_seqlen: int, geometry: list[int], scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of nsa_forward's first eight arguments."""
    return autograd.backward(
        do, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, indices, (lse_cmp, lse_slc, lse_win),
        (o_cmp, o_slc, o_win) if keep else None, Packing(cu_seqlens, doc, position, max_seqlen),
        Geometry(*geometry), scale=scale,
    )


@nsa_backward.register_fake
def _(*args):
    return tuple(x.new_empty(x.shape) for x in args[:INPUTS])


def _setup_context(ctx, inputs, output):
    *tensors, max_seqlen, geometry, scale, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.settings = (max_seqlen, geometry, scale, keep)


def _backward(ctx, do, *_):
    arguments = INPUTS + 7  # three tensors of the packing and four settings have no gradient
    if do is None:
        return (None,) * arguments
    saved = ctx.saved_tensors
    inputs, packing, results = saved[:INPUTS], saved[INPUTS : INPUTS + 3], saved[INPUTS + 3 :]
    grads = nsa_backward(*inputs, do, *results, *packing, *ctx.settings)
    return *grads, *(None,) * (arguments - INPUTS)


nsa_forward.register_autograd(_backward, setup_context=_setup_context)


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float, save_outputs: bool = True,
) -> tuple[Tensor, Tensor]:
    """The whole operator, see sieve.kernels.nsa.api: out [T, H, Dv] and the selected blocks int32 [T, Hkv, topk].

    The backward needs the three branches' outputs, 3 * T * H * Dv elements: save_outputs keeps them from the forward;
    without it the backward computes them again, in slices. Raises ValueError where scale is not positive or a head
    dimension has no kernel.
    """
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive; usually it is 1 / sqrt(head_dim_qk)")
    inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    keep = save_outputs and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    sizes = [
        geometry.kernel_size, geometry.kernel_stride, geometry.block_size, geometry.topk, geometry.init_blocks,
        geometry.local_blocks, geometry.window_size,
    ]
    out, indices, *_ = nsa_forward(
        *inputs, packing.cu_seqlens, packing.doc, packing.position, packing.max_seqlen, sizes, scale, keep
    )
    return out, indices
