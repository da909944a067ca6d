"""What `sieve bench moe` measures: random routed rows, the products and passes over them, and whole layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sieve.kernels.moe import reference
from sieve.kernels.moe.api import routed_experts
from sieve.kernels.moe.impl import Impl
from sieve.model.config import MoEConfig
from sieve.model.mlp import SwiGLU
from sieve.model.moe import MoE
from sieve.scripts.bench.timing import Call, Timing, reason, time_calls


@dataclass(frozen=True)
class Sizes:
    """Of one layer and its input; `device` and `dtype` of all tensors."""

    tokens: int
    hidden: int
    size: int
    experts: int
    top_k: int
    shared: int
    device: str
    dtype: torch.dtype

    @property
    def routes(self) -> int:
        return self.tokens * self.top_k

    def randn(self, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return (scale * torch.randn(*shape, device=self.device, generator=g)).to(self.dtype)

    def weights(self) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2 * size, hidden] and down [E, hidden, size]."""
        gate_up = self.randn(self.experts, 2 * self.size, self.hidden, scale=self.hidden**-0.5, seed=1)
        return gate_up, self.randn(self.experts, self.hidden, self.size, scale=self.size**-0.5, seed=2)

    def routing(self) -> tuple[Tensor, Tensor]:
        """Distinct random experts int64 [T, k] and their weights fp32 [T, k]."""
        g = torch.Generator(self.device).manual_seed(3)
        scores = torch.rand(self.tokens, self.experts, device=self.device, generator=g)
        weights, experts = scores.topk(self.top_k)
        return experts, weights / weights.sum(-1, keepdim=True)


def timed(calls: dict[str, Call], rounds: int, device: str) -> dict[str, Timing]:
    """time_calls on a GPU; on the CPU single calls by the clock, which shows that it runs and no more."""
    if device == "cuda":
        return time_calls(calls, rounds)
    found = {}
    for name, call in calls.items():
        try:
            begin = time.perf_counter()
            call()
        except Exception as error:  # as time_calls does
            found[name] = Timing(error=reason(error))
        else:
            ms = (time.perf_counter() - begin) * 1e3
            found[name] = Timing(ms, ms, ms)
    return found


def check(sizes: Sizes, impl: Impl) -> dict[str, float]:
    """Relative errors in norm of the output and all gradients against float64, expert by expert."""
    gate_up, down = sizes.weights()
    experts, weights = sizes.routing()
    leaves = [t.requires_grad_() for t in (sizes.randn(sizes.tokens, sizes.hidden, seed=4), gate_up, down, weights)]
    probe = sizes.randn(sizes.tokens, sizes.hidden, seed=5)
    out = routed_experts(*leaves[:3], experts, leaves[3], impl=impl)
    got = (out, *torch.autograd.grad(out, leaves, probe))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    x, gate_up, down, weights = exact
    want = torch.zeros_like(x)
    for e in range(sizes.experts):
        token, route = (experts == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up * weights[token, route][:, None]
        want = want.index_add(0, token, inner @ down[e].T)
    want = (want, *torch.autograd.grad(want, exact, probe.double()))
    names = ("out", "dx", "dgate_up", "ddown", "dweights")
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, got, want)}


def products(sizes: Sizes) -> dict[str, dict[str, Call]]:
    """By product: torch's grouped_mm, ours on rows that lie in order, ours with the gather in its loads where the layer
    has one, and the plain product of the same FLOPs ("plain")."""
    from sieve.kernels.moe import gemm
    from sieve.kernels.moe.gate_up import gate_up_swiglu
    from sieve.kernels.moe.sort import sort_routes

    grouped = torch.nn.functional.grouped_mm
    gate_up, down = sizes.weights()
    experts, weights = sizes.routing()
    ours = sort_routes(experts, weights, sizes.experts, gemm.TILE)
    torchs = sort_routes(experts, weights, sizes.experts, reference.TILE, fill=True)
    few = sizes.randn(sizes.tokens, sizes.hidden, seed=6)
    hidden, double, inner = sizes.hidden, 2 * sizes.size, sizes.size
    found: dict[str, dict[str, Call]] = {}

    def rows(places, width: int, seed: int) -> Tensor:
        made = sizes.randn(places.source.numel(), width, seed=seed)
        return made * (places.source < sizes.tokens)[:, None]

    def plain(m: int, n: int, k: int) -> Call:
        a, b = sizes.randn(m, k, seed=7), sizes.randn(n, k, seed=8)
        return lambda: a @ b.T

    x, h, i = ({"ours": rows(ours, w, s), "torch": rows(torchs, w, s)} for w, s in ((hidden, 9), (double, 10), (inner, 11)))
    end, order, R = ours.ends, ours.source, ours.source.numel()
    found["gate_up: rows x W^T"] = {
        "plain": plain(sizes.routes, double, hidden), "torch": lambda: grouped(x["torch"], gate_up.mT, offs=torchs.ends),
        "triton": lambda: gemm.rows_times_weights(x["ours"], gate_up, end, transposed=True),
        "triton, gathers": lambda: gemm.rows_times_weights(few, gate_up, end, transposed=True, index=order, rows=R),
        "triton, gathers, swiglu": lambda: gate_up_swiglu(few, gate_up, order, ours.scale, end),
    }
    found["down: rows x W^T"] = {
        "plain": plain(sizes.routes, hidden, inner), "torch": lambda: grouped(i["torch"], down.mT, offs=torchs.ends),
        "triton": lambda: gemm.rows_times_weights(i["ours"], down, end, transposed=True),
    }
    found["d inner: rows x W"] = {
        "plain": plain(sizes.routes, inner, hidden), "torch": lambda: grouped(x["torch"], down, offs=torchs.ends),
        "triton": lambda: gemm.rows_times_weights(x["ours"], down, end, transposed=False),
        "triton, gathers": lambda: gemm.rows_times_weights(few, down, end, transposed=False, index=order, rows=R),
    }
    found["d x: rows x W"] = {
        "plain": plain(sizes.routes, hidden, double), "torch": lambda: grouped(h["torch"], gate_up, offs=torchs.ends),
        "triton": lambda: gemm.rows_times_weights(h["ours"], gate_up, end, transposed=False),
    }
    # The plain product of a sum over rows has them in one dimension: T * k rows deep, as wide as the weight.
    found["d gate_up: rows^T x rows"] = {
        "plain": plain_sum(sizes, double, hidden), "torch": lambda: grouped(h["torch"].mT, x["torch"], offs=torchs.ends),
        "triton": lambda: gemm.rows_times_rows(h["ours"], x["ours"], end),
        "triton, gathers": lambda: gemm.rows_times_rows(h["ours"], few, end, b_index=order),
    }
    found["d down: rows^T x rows"] = {
        "plain": plain_sum(sizes, hidden, inner), "torch": lambda: grouped(x["torch"].mT, i["torch"], offs=torchs.ends),
        "triton": lambda: gemm.rows_times_rows(x["ours"], i["ours"], end),
        "triton, gathers": lambda: gemm.rows_times_rows(few, i["ours"], end, a_index=order),
    }
    return found


def plain_sum(sizes: Sizes, m: int, n: int) -> Call:
    """The FLOPs of a weights' gradient as one product whose output has the size of all experts' weights: 2 T k m n."""
    depth = max(8, sizes.routes // sizes.experts // 8 * 8)
    a, b = sizes.randn(depth, sizes.experts * m, seed=12), sizes.randn(depth, n, seed=13)
    return lambda: a.T @ b


def passes(sizes: Sizes) -> dict[str, tuple[dict[str, Call], int]]:
    """By pass: ours and torch's, and the bytes that must move."""
    from sieve.kernels.moe import gemm
    from sieve.kernels.moe import passes as kernels
    from sieve.kernels.moe.sort import sort_routes

    experts, weights = sizes.routing()
    places = sort_routes(experts, weights, sizes.experts, gemm.TILE)
    R, each = places.source.numel(), torch.empty((), dtype=sizes.dtype).element_size()
    x, y = sizes.randn(sizes.tokens, sizes.hidden), sizes.randn(R, sizes.hidden)
    h, dinner = sizes.randn(R, 2 * sizes.size), sizes.randn(R, sizes.size)
    slot, source, routes = places.slot.long(), places.source.long().clamp(max=sizes.tokens - 1), sizes.routes
    wide, narrow = routes * sizes.hidden * each, routes * sizes.size * each
    once = sizes.tokens * sizes.hidden * each

    def torch_swiglu() -> Tensor:
        gate, up = h.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up * places.scale[:, None].to(h.dtype)

    return {
        "sort": ({
            "triton": lambda: sort_routes(experts, weights, sizes.experts, gemm.TILE),
            "torch": lambda: reference.group_by_expert(experts, sizes.experts, gemm.TILE),
        }, routes * (8 + 8 + 4 + 4 + 4)),
        "copy to rows": (
            {"triton": lambda: kernels.copy_rows(x, places.source), "torch": lambda: x[source]}, wide + once,
        ),
        "sum of routes": ({
            "triton": lambda: kernels.sum_routes(y, places.slot, sizes.top_k),
            "torch": lambda: y[slot].view(sizes.tokens, sizes.top_k, -1).sum(1),
        }, wide + once),
        "swiglu": (
            {"triton": lambda: kernels.swiglu(h, places.scale, places.ends), "torch": torch_swiglu}, 3 * narrow,
        ),
        "swiglu backward": (
            {"triton": lambda: kernels.swiglu_backward(dinner, h, places.scale, places.ends)}, 6 * narrow,
        ),
    }  # fmt: skip


def layers(sizes: Sizes, impls: list[Impl], compiled: bool) -> dict[str, Call]:
    """Forward and backward of whole layers, router and shared experts included, and of the dense SwiGLU as wide as what
    a token visits ("dense")."""

    def step(layer: torch.nn.Module) -> Call:
        run: Callable = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
        leaves = [sizes.randn(sizes.tokens, sizes.hidden, seed=14).requires_grad_(), *layer.parameters()]
        probe = sizes.randn(sizes.tokens, sizes.hidden, seed=15)

        def call() -> object:
            out = run(leaves[0])
            return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, probe)

        return call

    def filled(layer: torch.nn.Module) -> torch.nn.Module:
        layer.to(sizes.device, sizes.dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(std=p.shape[-1] ** -0.5)
        return layer

    torch.manual_seed(0)
    made = {"dense": step(filled(SwiGLU(sizes.hidden, (sizes.top_k + sizes.shared) * sizes.size)))}
    for impl in impls:
        config = MoEConfig(
            num_experts=sizes.experts, top_k=sizes.top_k, expert_size=sizes.size, num_shared=sizes.shared, impl=impl
        )
        made[impl] = step(filled(MoE(sizes.hidden, config)))
    return made
