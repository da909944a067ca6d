"""Mixture of experts without dropped tokens (DeepSeekMoE, arXiv 2401.06066): sorted by expert, two grouped products."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sieve.model.config import MoEConfig
from sieve.model.mlp import SwiGLU
from sieve.model.router import Router

# Rows of one expert are padded to a multiple of this. A matrix product computes a row the same way, to the last bit,
# only while its row count keeps to whole tiles: with padding, what an expert makes of a token does not depend on how
# many others visit it, and so not on later tokens. It also leaves no group empty: every weight gets its gradient.
TILE = 16


class Grouping(NamedTuple):
    """Where routed rows lie when sorted by expert: R = a static bound, T * k rows and every expert's padding.

    slot: int64 [T, k], the sorted place of each route. source: int64 [R], the token in each place, T where padding.
    ends: int32 [E], the end of each expert's rows; the last is R.
    """

    slot: Tensor
    source: Tensor
    ends: Tensor


def group_by_expert(experts: Tensor, num_experts: int) -> Grouping:
    """experts int64 [T, k] -> Grouping, tokens of an expert in their order. Nothing is read on the host."""
    (T, k), device = experts.shape, experts.device
    flat = experts.flatten()
    rows = (T * k + num_experts * TILE + TILE - 1) // TILE * TILE
    count = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (count.clamp(min=1) + TILE - 1) // TILE * TILE
    end = padded.cumsum(0)
    order = flat.argsort(stable=True)
    shift = (end - padded) - (count.cumsum(0) - count)  # by how far padding moves an expert's rows
    place = torch.arange(T * k, device=device) + shift[flat[order]]
    slot = torch.empty_like(flat).scatter_(0, order, place)
    source = torch.full((rows,), T, device=device).scatter_(0, place, order // k)
    end[-1].fill_(rows)  # an assignment would wait for the device
    return Grouping(slot.view(T, k), source, end.int())


class _Scatter(torch.autograd.Function):
    """x [T, D] -> [R, D], each token's row copied to its routes' places, zeros between; backward sums them in order."""

    @staticmethod
    def forward(ctx, x: Tensor, slot: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[source]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return _sum_routes(grad, slot), None, None


class _Gather(torch.autograd.Function):
    """y [R, D] -> [T, D], the sum of each token's routes, in their order; the transpose of _Scatter."""

    @staticmethod
    def forward(ctx, y: Tensor, slot: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_routes(y, slot)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return torch.cat([grad, grad.new_zeros(1, grad.shape[1])])[source], None, None


def _sum_routes(y: Tensor, slot: Tensor) -> Tensor:
    """y [R, D], slot [T, k] -> [T, D]: no atomics, so the same sum in every run."""
    return y[slot.flatten()].view(*slot.shape, y.shape[1]).sum(1)


class Experts(nn.Module):
    """E SwiGLU experts in stacked weights: gate_up [E, 2 * size, hidden] (gate's rows first), down [E, hidden, size].

    x [T, hidden], experts int64 [T, k], weights fp32 [T, k] -> [T, hidden], the weighted sum over a token's experts.
    An expert that no token visits gets a gradient of zeros.
    """

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        E, size = config.num_experts, config.expert_size
        self.gate_up = nn.Parameter(torch.full((E, 2 * size, hidden), math.nan))  # see sieve.model.init
        self.down = nn.Parameter(torch.full((E, hidden, size), math.nan))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if torch.is_autocast_enabled(x.device.type):  # grouped_mm is not among the operations autocast knows
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        slot, source, ends = group_by_expert(experts, gate_up.shape[0])
        rows = _Scatter.apply(x, slot, source)
        gate, up = nn.functional.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, -1)
        # The routing weight multiplies the narrower side of the down projection.
        scale = rows.new_zeros(rows.shape[0]).index_put((slot,), weights.to(rows.dtype))
        inner = nn.functional.silu(gate) * up * scale[:, None]
        return _Gather.apply(nn.functional.grouped_mm(inner, down.mT, offs=ends), slot, source)


class MoE(nn.Module):
    """Shared experts, which every token visits (one SwiGLU as wide as all of them), plus its routed ones.

    x [T, hidden] -> [T, hidden] and {"load": fp32 [E]}, with {"aux_loss": fp32 scalar} when balance="aux". real: as
    Router takes it.
    """

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(hidden, config)
        self.experts = Experts(hidden, config)
        self.shared = SwiGLU(hidden, config.num_shared * config.expert_size) if config.num_shared else None

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, dict]:
        routes = self.router(x, real)
        out = self.experts(x, routes.experts, routes.weights)
        if self.shared is not None:
            out = out + self.shared(x)
        aux = {"load": routes.load}
        if routes.aux_loss is not None:
            aux["aux_loss"] = routes.aux_loss
        return out, aux
