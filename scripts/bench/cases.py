"""What is measured: shapes, inputs, the operator and its branches as calls, and the least arithmetic of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing

Call = Callable[[], object]
BRANCHES = ("compression", "scores", "selection", "window", "gates")


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """heads/kv_heads/d_qk/d_v, as 64/4/128/128."""
        try:
            return cls(*(int(part) for part in text.split("/")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"shape {text!r} is not heads/kv_heads/d_qk/d_v, as in 64/4/128/128") from error

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.d_qk}/{self.d_v}"


@dataclass(frozen=True)
class Case:
    """One row of `tokens` tokens: the operator's eight inputs, its packing, and a gradient of its output."""

    shape: Shape
    geometry: Geometry
    inputs: tuple[Tensor, ...]
    packing: Packing
    do: Tensor

    @property
    def scale(self) -> float:
        return self.shape.d_qk**-0.5


def draw(shape: Shape, tokens: int, geometry: Geometry, structured: bool, seed: int = 0, documents: int = 1) -> Case:
    """Random inputs in bf16. Structured: a group's queries drift slowly along the row, as trained ones do, so that
    neighbours want much the same blocks; otherwise every query wants blocks of its own, the hardest case."""
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=g)

    slots = tokens // geometry.kernel_stride
    q = normal(tokens, shape.heads, shape.d_qk)
    if structured:
        drift = normal(shape.kv_heads, shape.d_qk, tokens // 64 + 2).float()
        drift = torch.nn.functional.interpolate(drift, size=tokens, mode="linear", align_corners=True)
        drift = drift.permute(2, 0, 1).repeat_interleave(shape.heads // shape.kv_heads, 1)
        q = (2.4 * drift + 0.8 * q.float()).to(torch.bfloat16)
    keys = [normal(n, shape.kv_heads, d) for n in (slots, tokens, tokens) for d in (shape.d_qk, shape.d_v)]
    gates = torch.sigmoid(normal(tokens, shape.heads, 3))
    inputs = tuple(x.requires_grad_() for x in (q, *keys, gates))
    ends = torch.linspace(0, tokens, documents + 1, device="cuda").int()
    packing = Packing.of(ends, tokens, -(-tokens // documents) + 1)
    return Case(shape, geometry, inputs, packing, normal(tokens, shape.heads, shape.d_v))


def operator_calls(case: Case, save_outputs: bool = True) -> tuple[Call, Call]:
    """The whole operator through autograd: (forward, backward)."""
    from sieve.kernels.nsa.triton_ops import nsa_attention

    def forward() -> Tensor:
        args = (*case.inputs, case.packing, case.geometry)
        return nsa_attention(*args, scale=case.scale, save_outputs=save_outputs)[0]

    held: list[Tensor] = []

    def backward() -> object:
        if not held:
            held.append(forward())
        return torch.autograd.grad(held[0], case.inputs, case.do, retain_graph=True)

    return forward, backward


def branch_calls(case: Case) -> tuple[dict[str, Call], dict[str, Call]]:
    """Each branch's kernels alone, by BRANCHES' names: (forward, backward). gates' forward is what fusing it costs."""
    from sieve.kernels.nsa.compress_bwd import compressed_attention_bwd
    from sieve.kernels.nsa.compress_fwd import compressed_attention_fwd
    from sieve.kernels.nsa.gate import combine, combine_backward
    from sieve.kernels.nsa.scores_topk import select_blocks
    from sieve.kernels.nsa.select_dkv import selected_dkv
    from sieve.kernels.nsa.select_dq import selected_dq
    from sieve.kernels.nsa.select_fwd import selected_attention_fwd
    from sieve.kernels.nsa.window_bwd import window_dkv, window_dq
    from sieve.kernels.nsa.window_fwd import window_attention_combine, window_attention_fwd

    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x.detach() for x in case.inputs)
    packing, geometry, do, w, s = case.packing, case.geometry, case.do, case.geometry.window_size, case.scale
    o_cmp, lse_cmp = compressed_attention_fwd(q, k_cmp, v_cmp, packing, geometry, scale=s)
    indices = select_blocks(q, k_cmp, lse_cmp, packing, geometry, scale=s)
    o_slc, lse_slc = selected_attention_fwd(q, k_slc, v_slc, indices, packing, geometry, scale=s)
    o_win, lse_win = window_attention_fwd(q, k_win, v_win, packing, w, scale=s)
    outputs, lse, out = (o_cmp, o_slc, o_win), (lse_cmp, lse_slc, lse_win), torch.empty_like(o_win)
    dgates, dq = torch.empty_like(gates), torch.zeros_like(q)
    deltas, shifted = ([torch.empty_like(x) for x in lse] for _ in range(2))
    combine_backward(do, outputs, gates, lse, dgates, deltas, shifted)
    selected = do, q, k_slc, v_slc, indices, shifted[1], deltas[1], packing, geometry
    window = do, q, k_win, v_win, shifted[2], deltas[2], packing, w
    compressed = do, q, k_cmp, v_cmp, shifted[0], deltas[0], packing, geometry
    gated = o_cmp, o_slc, gates, out, o_win, lse_win
    forward = {
        "compression": lambda: compressed_attention_fwd(q, k_cmp, v_cmp, packing, geometry, scale=s),
        "scores": lambda: select_blocks(q, k_cmp, lse_cmp, packing, geometry, scale=s),
        "selection": lambda: selected_attention_fwd(q, k_slc, v_slc, indices, packing, geometry, scale=s),
        "window": lambda: window_attention_fwd(q, k_win, v_win, packing, w, scale=s),
        "window + gates": lambda: window_attention_combine(q, k_win, v_win, packing, w, *gated, scale=s),
        "gates": lambda: combine(*outputs, gates),
    }
    backward = {
        "compression": lambda: compressed_attention_bwd(*compressed, scale=s, dq=dq),
        "selection": lambda: (selected_dq(*selected, scale=s, dq=dq), selected_dkv(*selected, scale=s)),
        "window": lambda: (window_dq(*window, scale=s, dq=dq), window_dkv(*window, scale=s)),
        "gates": lambda: combine_backward(do, outputs, gates, lse, dgates, deltas, shifted),
        "selection dq": lambda: selected_dq(*selected, scale=s, dq=dq),
        "selection dkv": lambda: selected_dkv(*selected, scale=s),
        "window dq": lambda: window_dq(*window, scale=s, dq=dq),
        "window dkv": lambda: window_dkv(*window, scale=s),
    }
    return forward, backward


def visible_pairs(tokens: int, geometry: Geometry) -> dict[str, int]:
    """(query, key) pairs of one head in one causal document of `tokens` tokens, by branch, and for dense attention."""
    g = geometry
    t = torch.arange(tokens)
    blocks = ((t + 1 - g.kernel_size) // g.kernel_stride + 1).clamp(min=0)
    selected = (t // g.block_size).clamp(max=g.topk - 1) * g.block_size + t % g.block_size + 1
    window = (t + 1).clamp(max=g.window_size)
    return {
        "compression": int(blocks.sum()), "selection": int(selected.sum()), "window": int(window.sum()),
        "dense": tokens * (tokens + 1) // 2,
    }  # fmt: skip


def least_flops(shape: Shape, tokens: int, geometry: Geometry) -> tuple[dict[str, float], dict[str, float]]:
    """Matrix-product FLOPs, forward and backward, by branch and for "dense": two products forward and five backward.

    The scores for the top-n are counted once more, since their softmax needs the whole row's sum first.
    """
    pairs = visible_pairs(tokens, geometry)
    forward = {name: 2.0 * n * shape.heads * (shape.d_qk + shape.d_v) for name, n in pairs.items()}
    backward = {name: 2.0 * n * shape.heads * (3 * shape.d_qk + 2 * shape.d_v) for name, n in pairs.items()}
    forward["scores"] = 2.0 * pairs["compression"] * shape.heads * shape.d_qk
    for flops in (forward, backward):
        flops["operator"] = sum(n for name, n in flops.items() if name != "dense")
    return forward, backward
