"""Mixture of experts without dropped tokens (DeepSeekMoE, arXiv 2401.06066); the products are sieve.kernels.moe's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sieve.kernels.moe.api import LOCAL, routed_experts
from sieve.model.config import MoEConfig
from sieve.model.mlp import SwiGLU
from sieve.model.router import Router


class Experts(nn.Module):
    """E SwiGLU experts in stacked weights: gate_up [E, 2 * size, hidden] (gate's rows first), down [E, hidden, size].

    x [T, hidden], experts int64 [T, k], weights fp32 [T, k] -> [T, hidden], the weighted sum over a token's experts.
    An expert that no token visits gets a gradient of zeros. `dispatch` is how rows get to them and back (docs/moe.md):
    with expert parallelism another object, and weights of the experts here alone.
    """

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        E, size = config.num_experts, config.expert_size
        self.impl, self.dispatch = config.impl, LOCAL
        self.gate_up = nn.Parameter(torch.full((E, 2 * size, hidden), math.nan))  # see sieve.model.init
        self.down = nn.Parameter(torch.full((E, hidden, size), math.nan))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if torch.is_autocast_enabled(x.device.type):  # grouped_mm is not among the operations autocast knows
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        return routed_experts(x, gate_up, down, experts, weights, impl=self.impl, dispatch=self.dispatch)


class MoE(nn.Module):
    """Shared experts, which every token visits (one SwiGLU as wide as all of them), plus its routed ones.

    x [T, hidden] -> [T, hidden] and {"load": fp32 [E]}, with {"aux_loss": fp32 scalar} when balance="aux" or
    "both", or with a z-loss, and {"sample": fp32 [n, E]} where Routes has one. real: as Router takes it.
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
        if routes.sample is not None:
            aux["sample"] = routes.sample
        return out, aux
