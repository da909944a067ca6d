"""Attention of a few queries over many keys with an explicit mask: the arithmetic of the torch references."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is computed in fp32; fp32 and fp64 stay."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [B, K, G, n, D] and k [B, K, m, D] (K KV heads, G query heads each) -> scale * q k^T [B, K, G, n, m]."""
    B, K, G, n, D = q.shape
    return ((q * scale).reshape(B * K, G * n, D) @ k.reshape(B * K, -1, D).mT).view(B, K, G, n, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention where `visible`, differentiable in q, k, v.

    q [B, K, G, n, Dqk], k [B, K, m, Dqk], v [B, K, m, Dv], visible bool, broadcastable to [B, K, 1, n, m].
    Returns o [B, K, G, n, Dv] and lse [B, K, G, n] (natural log, not differentiable). A row that sees no key has
    o exactly 0 and lse -inf, and passes no gradient. A hidden key's weight is exactly 0, so that finite changes of
    hidden keys do not change a bit of o.
    """
    B, K, G, n, _ = q.shape
    s = scores(q, k, scale).masked_fill(~visible, -math.inf)
    with torch.no_grad():
        # With no key at all there is nothing to take the largest of.
        top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
        some = top > -math.inf
    # A row of nothing but -inf would make softmax and its backward NaN: give it zeros, then drop its output.
    p = torch.softmax(torch.where(some, s, 0.0), -1)
    o = (p.view(B * K, G * n, -1) @ v.reshape(B * K, -1, v.shape[-1])).view(B, K, G, n, -1)
    with torch.no_grad():
        # The largest weight is 1 / sum(exp(s - top)), which saves another pass of exp.
        lse = (torch.where(some, top - p.amax(-1, keepdim=True).log(), -math.inf) if s.shape[-1] else top).squeeze(-1)
    return torch.where(some, o, 0.0), lse
