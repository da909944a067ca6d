"""The bias at which every expert would get its share of given tokens, from how their scores are spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 4  # of one call; the next one goes on from there


def sample(scores: Tensor, limit: int, real: Tensor | None = None) -> Tensor:
    """Of scores [T, E] every n-th row, at most `limit` of them, in memory of their own. The rows that are not `real` (bool
    [T]) are NaN: how `balanced_bias` knows them. Sizes follow from T alone."""
    step = math.ceil(scores.shape[0] / limit)
    rows = scores.detach()[::step]
    return rows.clone() if real is None else rows.masked_fill(~real[::step, None], math.nan)


@torch.no_grad()
def balanced_bias(
    scores: Tensor, bias: Tensor, top_k: int, *, num_groups: int = 1, top_groups: int = 1, rounds: int = ROUNDS
) -> Tensor:
    """scores [..., N, E] (a row that is not finite is no token), bias [..., E] -> bias [..., E] of mean 0.

    Dual steps of the assignment that maximises the sum of chosen scores where each token has top_k experts and each expert
    N * top_k / E tokens (arXiv 2502.15451, algorithm 1, there without its mean of two thresholds): a token's price is
    halfway between the last score + bias chosen and the first one not, an expert's bias minus the quantile of score - price
    that leaves its share above. Each round moves all experts at once, from `bias` on. With groups, what an expert lacks is
    the larger of what its place in the group's score lacks and what it lacks itself, the others standing still; since they
    move too, half a step is made. Without tokens the bias stays as it was.
    """
    E = scores.shape[-1]
    real = scores.isfinite().all(-1, keepdim=True)  # [..., N, 1]
    count = real.sum(-2)  # [..., 1]
    scores = torch.where(real, scores, 0)
    # Halfway between the last that is to be chosen and the next, as position among them in falling order, from 0.
    place = (count * (top_k / E) - 0.5).clamp(min=0)
    place = torch.minimum(place, (count - 1).clamp(min=0))
    low = place.long()
    high = torch.minimum(low + 1, (count - 1).clamp(min=0))
    part = (place - low).to(scores.dtype)
    grouped = top_groups < num_groups
    new = bias
    for _ in range(rounds if top_k < E else 0):
        wanted = scores + new[..., None, :]
        margin = _margin_within_groups(wanted, top_k, num_groups, top_groups) if grouped else _margin(wanted, wanted, top_k, E)
        margin = torch.where(real, margin, -math.inf).transpose(-1, -2).sort(-1, descending=True).values  # [..., E, N]
        a, b = (margin.gather(-1, at[..., None, :].expand(*margin.shape[:-1], 1)).squeeze(-1) for at in (low, high))
        step = a + part * (b - a)
        new = new - (step / 2 if grouped else step)
        new = new - new.mean(-1, keepdim=True)
    return torch.where(count > 0, new, bias)


def _margin(wanted: Tensor, candidates: Tensor, top_k: int, reach: int) -> Tensor:
    """wanted less each token's price among `candidates`, of which `reach` may be chosen."""
    best = candidates.topk(min(top_k + 1, reach), -1).values
    return wanted - best[..., top_k - 1 :].mean(-1, keepdim=True)


def _margin_within_groups(wanted: Tensor, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    """By how much an expert's bias could fall before a token leaves it, or minus what it must rise to get the token."""
    groups = wanted.unflatten(-1, (num_groups, -1))  # [..., G, size]
    size = groups.shape[-1]
    best = groups.sort(-1, descending=True).values
    # Of the experts beside each one the best two: what the group's score is made of with it and without it.
    lacking = (*groups.shape[:-1], 1)
    first = best[..., :1]
    second = best[..., 1:2] if size > 1 else groups.new_zeros(lacking)
    third = best[..., 2:3] if size > 2 else groups.new_full(lacking, -math.inf)
    other = torch.where(groups >= first, second, first)
    without = other + torch.where(groups >= second, third, second)
    if size == 1:
        without = torch.full_like(groups, -math.inf)
    score = best[..., :2].sum(-1, keepdim=True)  # [..., G, 1]
    edge = score.squeeze(-1).topk(top_groups + 1, -1).values
    edge = edge[..., top_groups - 1 :].mean(-1)[..., None, None]
    enters = torch.where(without > edge, math.inf, groups + other - edge).flatten(-2)
    inside = torch.where(score > edge, groups, -math.inf).flatten(-2)
    return torch.minimum(_margin(wanted, inside, top_k, top_groups * size), enters)
