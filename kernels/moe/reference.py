"""Routed SwiGLU experts in plain PyTorch: sorted by expert, two grouped products; the meaning the kernels are tested by."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

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


def bound_of_rows(routes: int, num_experts: int, tile: int) -> int:
    """Rows that hold `routes` routes, each expert's padded to at least one whole tile, however they are spread."""
    return (routes + num_experts * tile + tile - 1) // tile * tile


def group_by_expert(experts: Tensor, num_experts: int, tile: int = TILE) -> Grouping:
    """experts int64 [T, k] -> Grouping, tokens of an expert in their order. Nothing is read on the host."""
    (T, k), device = experts.shape, experts.device
    flat = experts.flatten()
    rows = bound_of_rows(T * k, num_experts, tile)
    count = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (count.clamp(min=1) + tile - 1) // tile * tile
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


class Sent(NamedTuple):
    """What a Dispatch hands to the experts of this process.

    rows: [R, hidden] in the order of its experts, differentiable; rows of padding are 0. scale: [R] in the rows' dtype,
    the routing weight of each row, 0 where padding, differentiable. ends: int32 [experts here], the end of each one's
    rows. handle: what `back` needs.
    """

    rows: Tensor
    scale: Tensor
    ends: Tensor
    handle: object


class Dispatch(Protocol):
    """The way of tokens to experts and back: the one seam that expert parallelism has to fill.

    send: x [T, hidden], experts int64 [T, k] in [0, num_experts), weights fp32 [T, k] -> Sent. back: y [R, hidden], what
    the experts made of Sent.rows, and its handle -> [T, hidden], the sum over each token's routes. Both are
    differentiable and wait for nothing on the host; `back` of `send` moves every row to where it came from. num_experts
    counts the experts of all processes, Sent.ends those whose weights are here.
    """

    def send(self, x: Tensor, experts: Tensor, weights: Tensor, num_experts: int) -> Sent: ...

    def back(self, y: Tensor, handle: object) -> Tensor: ...


class LocalDispatch:
    """All experts are here: a permutation."""

    def send(self, x: Tensor, experts: Tensor, weights: Tensor, num_experts: int) -> Sent:
        slot, source, ends = group_by_expert(experts, num_experts)
        rows = _Scatter.apply(x, slot, source)
        scale = rows.new_zeros(rows.shape[0]).index_put((slot,), weights.to(rows.dtype))
        return Sent(rows, scale, ends, (slot, source))

    def back(self, y: Tensor, handle: tuple[Tensor, Tensor]) -> Tensor:
        return _Gather.apply(y, *handle)


def routed_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, num_experts: int, dispatch: Dispatch
) -> Tensor:
    """As sieve.kernels.moe.api; gate_up and down are those of the experts here, which dispatch.send tells of."""
    rows, scale, ends, handle = dispatch.send(x, experts, weights, num_experts)
    gate, up = torch.nn.functional.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, -1)
    # The routing weight multiplies the narrower side of the down projection.
    inner = torch.nn.functional.silu(gate) * up * scale[:, None]
    return dispatch.back(torch.nn.functional.grouped_mm(inner, down.mT, offs=ends), handle)
