"""Routes sorted by expert with two passes over them: a stable counting sort, without atomics and without the host.

Routes are cut into chunks; a first kernel counts each chunk's routes by expert, sums over chunks say where a chunk's
routes of an expert begin, and a second kernel places each route behind the equal ones before it in its chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.moe.reference import bound_of_rows

CHUNK = 128


class Places(NamedTuple):
    """As sieve.kernels.moe.reference.Grouping, int32, with the rows' weights.

    slot: int32 [T * k]. source: int32 [R], T where padding. scale: fp32 [R], the routing weight, 0 where padding.
    ends: int32 [E]; rows from ends[-1] on hold nothing, unless the last expert was to take them all.
    """

    slot: Tensor
    source: Tensor
    scale: Tensor
    ends: Tensor


@triton.jit(do_not_specialize=["routes"])
def _count(experts_ptr, count_ptr, routes, experts, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(experts_ptr + at, mask=at < routes, other=-1).to(tl.int32)
    number = tl.arange(0, WIDTH)
    count = tl.sum((expert[:, None] == number[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + number * tl.num_programs(0) + chunk, count, mask=number < experts)


@triton.jit(do_not_specialize=["routes"])
def _place(
    experts_ptr, weights_ptr, begin_ptr, slot_ptr, source_ptr, scale_ptr, routes,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    local = tl.arange(0, CHUNK)
    at = chunk * CHUNK + local
    ok = at < routes
    expert = tl.load(experts_ptr + at, mask=ok, other=0).to(tl.int32)
    others = tl.load(experts_ptr + at, mask=ok, other=-1).to(tl.int32)  # the same, but past the end equal to none
    before = (expert[:, None] == others[None, :]) & (local[:, None] > local[None, :])
    place = tl.load(begin_ptr + expert * tl.num_programs(0) + chunk, mask=ok, other=0) + tl.sum(before.to(tl.int32), 1)
    tl.store(slot_ptr + at, place, mask=ok)
    tl.store(source_ptr + place, at // TOP_K, mask=ok)
    tl.store(scale_ptr + place, tl.load(weights_ptr + at, mask=ok, other=0.0).to(tl.float32), mask=ok)


def sort_routes(experts: Tensor, weights: Tensor, num_experts: int, tile: int, *, fill: bool = False) -> Places:
    """experts int64 [T, k], weights [T, k] -> Places, each expert's rows padded to whole tiles, at least one.

    fill: the last expert takes all rows left, as torch's grouped_mm wants it.
    """
    (T, k), device = experts.shape, experts.device
    routes, rows = T * k, bound_of_rows(T * k, num_experts, tile)
    experts, weights = experts.contiguous(), weights.contiguous()
    chunks = triton.cdiv(routes, CHUNK)
    # Experts are the rows: sums along rows are made by many threads, sums down columns by one each.
    count = torch.empty(num_experts, chunks, dtype=torch.int32, device=device)
    slot = torch.empty(routes, dtype=torch.int32, device=device)
    source = torch.full((rows,), T, dtype=torch.int32, device=device)
    scale = torch.zeros(rows, dtype=torch.float32, device=device)
    width = triton.next_power_of_2(num_experts)
    _count[(chunks,)](experts, count, routes, num_experts, WIDTH=width, CHUNK=CHUNK)
    upto = count.cumsum(1, dtype=torch.int32)
    padded = (upto[:, -1].clamp(min=1) + tile - 1) // tile * tile
    ends = padded.cumsum(0, dtype=torch.int32)
    begin = upto - count + (ends - padded)[:, None]
    _place[(chunks,)](
        experts, weights, begin, slot, source, scale, routes, TOP_K=k, CHUNK=CHUNK
    )
    if fill:
        ends[-1].fill_(rows)
    return Places(slot, source, scale, ends)
