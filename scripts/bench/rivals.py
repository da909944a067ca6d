"""Other implementations to measure beside ours, where they are installed: full attention and fla's NSA."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from sieve.scripts.bench.cases import Case

Call = Callable[[], object]
RIVALS = ("fa4", "cudnn", "fa2", "fla")
TUNED = ("fla",)  # tries dozens of settings for each kernel at its first call, and says nothing


def _fa4(case: Case) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[Tensor, ...]]:
    attention = importlib.import_module("flash_attn.cute").flash_attn_func
    q, _, _, k, v = (x.detach()[None] for x in case.inputs[:5])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, softmax_scale=case.scale, causal=True)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return call, (q, k, v)


def _sdpa(case: Case, backend: str) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[Tensor, ...]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.FLASH_ATTENTION
    q, _, _, k, v = (x.detach().transpose(0, 1)[None] for x in case.inputs[:5])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=case.scale, enable_gqa=True
            )
        return out[0].transpose(0, 1)

    return call, (q, k, v)


def _fla(case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """fla's NSA with its own pooled compression, l = d = l' = block_size, and no window."""
    attention = importlib.import_module("fla.ops.nsa").parallel_nsa
    q, _, _, k, v = (x.detach()[None] for x in case.inputs[:5])
    gates = case.inputs[7].detach()[None]

    def call(q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor, g_slc: Tensor) -> Tensor:
        sizes = {"block_counts": case.geometry.topk, "block_size": case.geometry.block_size}
        return attention(q, k, v, g_cmp, g_slc, scale=case.scale, **sizes)[0]

    return call, (q, k, v, gates[..., 0].contiguous(), gates[..., 1].contiguous())


def rival_calls(case: Case, name: str) -> tuple[Call, Call]:
    """(forward, backward) of a rival on the case's queries and selection keys; ImportError if it is not installed."""
    make = {"fa4": _fa4, "fla": _fla}.get(name)
    attention, inputs = make(case) if make else _sdpa(case, name)
    inputs = tuple(x.requires_grad_() for x in inputs)
    held: list[Tensor] = []

    def backward() -> object:
        if not held:
            held.append(attention(*inputs))
        return torch.autograd.grad(held[0], inputs, case.do, retain_graph=True)

    return lambda: attention(*inputs), backward
