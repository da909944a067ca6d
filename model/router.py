"""Which experts a token visits: scores in fp32, top-k, and the bias that balances without an auxiliary loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sieve.model.balance import balanced_bias, sample
from sieve.model.config import MoEConfig


class Routes(NamedTuple):
    """experts: int64 [T, k], the score's order, best first. weights: fp32 [T, k], what their outputs are multiplied by.
    load: fp32 [E], how many tokens each expert got (detached). aux_loss: fp32 scalar (coefficients applied), load balance
    and z-loss, or None where neither is asked for. sample: fp32 [n, E], scores of some tokens (sieve.model.balance), while
    training with bias_update="quantile"; else None.
    """

    experts: Tensor
    weights: Tensor
    load: Tensor
    aux_loss: Tensor | None
    sample: Tensor | None = None


def balances_by_scores(config: MoEConfig) -> bool:
    """Whether the bias follows from a step's scores rather than from its load."""
    return config.balance in ("bias", "both") and config.bias_update == "quantile"


class Router(nn.Module):
    """Scores of x [T, hidden] in fp32, whatever the module's dtype; ties go to the lower expert.

    balance="bias" or "both" (arXiv 2408.15664): an expert is chosen by score + bias and weighed by its score alone;
    `update_bias` moves the bias of busy experts down, of idle ones up. The bias is a buffer that stays fp32 when the
    module is cast.
    """

    bias: Tensor

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.settle: Callable[[Tensor], Tensor] | None = None  # see Decoder.settling
        self.weight = nn.Parameter(torch.full((config.num_experts, hidden), math.nan))  # see sieve.model.init
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        kept = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:  # a cast: steps of 1e-3 would be lost in half precision
            self.bias = kept.to(self.bias.device)
        return self

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routes:
        """real: bool [T], the tokens that count for load and balance, all of them if None."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())  # [T, E]
        scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
        if self.settle is not None:
            update_biases([self], [self.settle(sample(scores, config.bias_tokens, real))])
        wanted = scores.detach() + self.bias if config.balance in ("bias", "both") else scores.detach()
        if config.top_groups < config.num_groups:
            wanted = self._within_groups(wanted)
        # A stable sort and not topk, which promises no order among equals.
        experts = wanted.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        weights = scores.gather(-1, experts)
        if config.normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        ones = torch.ones((), dtype=torch.int64, device=x.device).expand(experts.numel())
        if real is not None:
            ones = real.long()[:, None].expand_as(experts).flatten()
        load = torch.zeros(config.num_experts, dtype=torch.int64, device=x.device)
        load = load.scatter_add_(0, experts.flatten(), ones).float()
        kept = sample(scores, config.bias_tokens, real) if self.training and balances_by_scores(config) else None
        return Routes(experts, weights * config.routed_scale, load, self._penalty(logits, scores, load, real), kept)

    def _within_groups(self, wanted: Tensor) -> Tensor:
        """wanted [T, E], -inf outside each token's best groups: a group's score is the sum of its two best experts'."""
        config = self.config
        groups = wanted.unflatten(-1, (config.num_groups, -1))
        score = groups.sort(-1, descending=True).values[..., :2].sum(-1)  # [T, groups]
        best = score.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_groups]
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)

    def _penalty(self, logits: Tensor, scores: Tensor, load: Tensor, real: Tensor | None) -> Tensor | None:
        balance = self._aux_loss(scores, load, real)
        if not self.config.z_loss_coef:
            return balance
        square = logits.logsumexp(-1).square()
        mean = square.mean() if real is None else (square * real).sum() / real.sum().clamp(min=1)
        z_loss = self.config.z_loss_coef * mean
        return z_loss if balance is None else balance + z_loss

    def _aux_loss(self, scores: Tensor, load: Tensor, real: Tensor | None) -> Tensor | None:
        """aux_coef * E * sum of (share of the routes) * (mean normalised score): 1 * aux_coef when balanced.

        arXiv 2101.03961, equation 4, over all tokens of the micro-batch.
        """
        if self.config.balance not in ("aux", "both"):
            return None
        share = scores if self.config.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        mean = share.mean(0) if real is None else (share * real[:, None]).sum(0) / real.sum().clamp(min=1)
        return self.config.aux_coef * self.config.num_experts * (load / load.sum().clamp(min=1) * mean).sum()

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """One step of arXiv 2408.15664: load [E] tokens per expert, of a whole global batch.

        "sign" is its algorithm 1; "proportional" its variant of section 4.3, by the load's error in units of the mean
        load: large steps while one expert gets everything, and none when the load is even.
        """
        load = load.to(self.bias)
        error = load.mean() - load
        if self.config.bias_update == "proportional":
            error = error / load.mean().clamp(min=1)
        else:
            error = torch.sign(error)
        self.bias += self.config.bias_update_rate * error


@torch.no_grad()
def update_biases(routers: Sequence[Router], samples: Sequence[Tensor]) -> None:
    """bias_update="quantile": each router's bias moves to that of `balanced_bias` by the rate.

    samples: a router's scores, fp32 [n, E], of one step's global batch. All routers at once: small sorts, few launches.
    """
    if not routers:
        return
    config = routers[0].config
    wanted = balanced_bias(
        torch.stack(list(samples)), torch.stack([router.bias for router in routers]), config.top_k,
        num_groups=config.num_groups, top_groups=config.top_groups,
    )
    for router, bias in zip(routers, wanted, strict=True):
        router.bias.lerp_(bias, config.bias_update_rate)
