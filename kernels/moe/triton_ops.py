"""Routed experts as PyTorch operators, one forward and one backward: autograd, torch.compile and activation checkpointing
see opaque calls of known shapes. `fused`: Triton's grouped products with the gathers in their loads and SwiGLU in the
first one's epilogue; else torch's grouped_mm between Triton's passes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from sieve.kernels.moe import gemm, reference
from sieve.kernels.moe.gate_up import gate_up_swiglu
from sieve.kernels.moe.passes import copy_rows, sum_routes, swiglu, swiglu_backward
from sieve.kernels.moe.sort import sort_routes

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _tile(fused: bool) -> int:
    return gemm.TILE if fused else reference.TILE


@torch.library.custom_op("sieve::moe_forward", mutates_args=())
def moe_forward(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [T, hidden]; then for the backward: h [R, 2 * size], slot, source, scale, ends as sieve.kernels.moe.sort."""
    slot, source, scale, ends = sort_routes(experts, weights, gate_up.shape[0], _tile(fused), fill=not fused)
    x = x.contiguous()
    if fused:
        h, inner = gate_up_swiglu(x, gate_up, source, scale, ends)
        y = gemm.rows_times_weights(inner, down, ends, transposed=True)
    else:
        h = grouped_mm(copy_rows(x, source), gate_up.mT, offs=ends)
        y = grouped_mm(swiglu(h, scale, ends), down.mT, offs=ends)
    return sum_routes(y, slot, experts.shape[1]), h, slot, source, scale, ends


@moe_forward.register_fake
def _(x, gate_up, down, weights, experts, fused):
    num_experts, double, _ = gate_up.shape
    rows = reference.bound_of_rows(experts.numel(), num_experts, _tile(fused))
    index = lambda n: x.new_empty(n, dtype=torch.int32)  # noqa: E731
    scale = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(rows, double), index(experts.numel()), index(rows), scale, index(num_experts)


@torch.library.custom_op("sieve::moe_backward", mutates_args=())
def moe_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, slot: Tensor, source: Tensor, scale: Tensor,
    ends: Tensor, top_k: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of moe_forward's x, gate_up, down and weights (fp32 [T, k])."""
    x, grad = x.contiguous(), grad.contiguous()
    if fused:
        rows = source.numel()
        dinner = gemm.rows_times_weights(grad, down, ends, transposed=False, index=source, rows=rows)
        inner, dh, dscale = swiglu_backward(dinner, h, scale, ends)
        ddown = gemm.rows_times_rows(grad, inner, ends, a_index=source)
        dx = gemm.rows_times_weights(dh, gate_up, ends, transposed=False)
        dgate_up = gemm.rows_times_rows(dh, x, ends, b_index=source)
    else:
        dy = copy_rows(grad, source)
        inner, dh, dscale = swiglu_backward(grouped_mm(dy, down, offs=ends), h, scale, ends)
        ddown = grouped_mm(dy.mT, inner, offs=ends)
        dx = grouped_mm(dh, gate_up, offs=ends)
        dgate_up = grouped_mm(dh.mT, copy_rows(x, source), offs=ends)
    dweights = dscale[slot].view(-1, top_k)
    return sum_routes(dx, slot, top_k), dgate_up, ddown, dweights


@moe_backward.register_fake
def _(grad, x, gate_up, down, h, slot, source, scale, ends, top_k, fused):
    weights = x.new_empty(x.shape[0], top_k, dtype=torch.float32)
    return x.new_empty(x.shape), gate_up.new_empty(gate_up.shape), down.new_empty(down.shape), weights


def _setup_context(ctx, inputs, output):
    x, gate_up, down, _, experts, fused = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up, down, *output[1:])
    ctx.settings = (experts.shape[1], fused)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    return *moe_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None


moe_forward.register_autograd(_backward, setup_context=_setup_context)


def routed_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, *, fused: bool
) -> Tensor:
    """See sieve.kernels.moe.api. Keeps x, the first product [R, 2 * size] and the order of rows for the backward."""
    return moe_forward(x, gate_up, down, weights.float(), experts, fused)[0]
