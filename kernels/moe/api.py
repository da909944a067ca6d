"""Routed SwiGLU experts: one entry, arguments checked, implementation chosen. Imports without triton."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sieve.kernels.common.availability import why_not_triton
from sieve.kernels.common.log import log_once
from sieve.kernels.moe import reference
from sieve.kernels.moe.impl import Impl
from sieve.kernels.moe.reference import Dispatch, LocalDispatch

AUTO_ON_CUDA: Impl = "triton"  # the fastest whole layer on an H200: benchmarks/2026-11-24-training
LOCAL = LocalDispatch()


def resolve_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> Literal["torch", "mixed", "triton"]:
    """Which implementation runs; "auto" logs its choice once. Raises ValueError where an explicit one cannot be had."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is not one of {', '.join(get_args(Impl))}")
    if impl == "auto":
        wanted = AUTO_ON_CUDA if device.type == "cuda" else "torch"
        chosen = "torch" if wanted != "torch" and why_not_triton(device, dtype) else wanted
        log_once(__name__, f"experts: impl={chosen} on {device.type}")
        return chosen
    reason = None if impl == "torch" else why_not_triton(device, dtype)
    if reason:
        raise ValueError(f"impl={impl!r} cannot be had: {reason}; use impl='torch' or 'auto'")
    return impl


def routed_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, *, impl: Impl = "auto",
    dispatch: Dispatch = LOCAL,
) -> Tensor:
    """The weighted sum of what each token's experts make of it: w * down(silu(gate(x)) * up(x)), summed over k.

    x [T, hidden]; gate_up [E, 2 * size, hidden] (gate's rows first), down [E, hidden, size], both in x's dtype; experts
    int64 [T, k] in [0, E), those of a token distinct; weights fp32 [T, k] -> [T, hidden]. Differentiable in all but
    experts; an expert that no token visits has a gradient of zeros. No host synchronisation, no atomics in any sum.

    impl: "torch" (the meaning: torch's grouped_mm), "mixed" (torch's grouped_mm between Triton's passes), "triton"
    (Triton's products too, with the gathers in their loads). dispatch: how rows get to their experts; another than
    LOCAL goes with impl="torch". Raises ValueError for shapes that do not fit and implementations that cannot be had.
    """
    num_experts, double, hidden = gate_up.shape
    if x.shape[1:] != (hidden,) or down.shape != (num_experts, hidden, double // 2):
        raise ValueError(
            f"x {list(x.shape)}, gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit: "
            "they are [T, hidden], [E, 2 * size, hidden] and [E, hidden, size]"
        )
    if experts.shape != weights.shape or experts.dim() != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(
            f"experts {list(experts.shape)} and weights {list(weights.shape)} must both be [T, k] with T={x.shape[0]}"
        )
    if dispatch is not LOCAL:
        if impl not in ("auto", "torch"):
            raise ValueError(f"impl={impl!r} permutes by itself; with a dispatch of your own use impl='torch'")
        chosen = "torch"
    else:
        chosen = resolve_impl(impl, x.device, x.dtype)
    if chosen == "torch":
        return reference.routed_experts(x, gate_up, down, experts, weights, num_experts, dispatch)
    if x.shape[0] == 0:
        return x * 0.0
    from sieve.kernels.moe import triton_ops

    return triton_ops.routed_experts(x, gate_up, down, experts, weights, fused=chosen == "triton")
