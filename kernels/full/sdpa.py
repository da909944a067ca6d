"""Causal and sliding-window attention through scaled_dot_product_attention, a padded batch of documents at a time.

On a CPU it is several times faster than dense scores: its kernels keep scores in cache and never store them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sieve.kernels.common.dense import compute_dtype
from sieve.kernels.common.documents import Documents
from sieve.kernels.nsa.layout import Packing

CHUNK = 256  # queries of a window attended at once, with window + CHUNK keys


def fused_dtype(x: Tensor) -> torch.dtype:
    """What SDPA computes in: on a CPU its half-precision kernels round the weights, so half inputs go up to fp32."""
    return compute_dtype(x) if x.device.type == "cpu" else x.dtype


def attend_fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """SDPA over one chunk: q [B, K, G, n, D], k and v [B, K, 1, m, D] of one head size -> o [B, K, G, n, D].

    visible: bool, broadcastable to [B * K, 1, n, m], where every query must see a key; None is causal, with n = m.
    """
    B, K, G, n, D = q.shape
    k, v = (x.reshape(B * K, 1, -1, D).expand(-1, G, -1, -1) for x in (k, v))
    q = q.reshape(B * K, G, n, D)
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, scale=scale).view(B, K, G, n, D)


def one_head_size(*tensors: Tensor) -> list[Tensor]:
    """Pad the last dimension of each to the longest with zeros, which change neither scores nor outputs."""
    size = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] != size else x for x in tensors]


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, *, scale: float, chunk: int = CHUNK
) -> Tensor:
    """q [T, H, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv] -> [T, H, Dv] in q's dtype. Reads cu_seqlens on the host."""
    documents = Documents.of(packing)
    groups, Dv = k.shape[1], v.shape[2]
    padded = one_head_size(*(x.to(fused_dtype(x)) for x in (q, k, v)))
    outs = []
    for batch in documents.batches:
        qb, kb, vb = (batch.heads(x, groups) for x in padded)
        # Queries whose window reaches back to the document's start: plain causal attention.
        end = batch.length if window is None else min(window, batch.length)
        near, far = qb.split([end, batch.length - end], 3)
        parts = [attend_fused(near, kb[:, :, :, :end], vb[:, :, :, :end], None, scale)]
        for qs in far.split(chunk, 3) if end < batch.length else ():
            start, low = end, end - window + 1
            end = start + qs.shape[3]
            query = torch.arange(start, end, device=q.device)[:, None]
            key = torch.arange(low, end, device=q.device)
            visible = (key <= query) & (key > query - window)
            parts.append(attend_fused(qs, kb[:, :, :, low:end], vb[:, :, :, low:end], visible, scale))
        outs.append(torch.cat(parts, 3))
    return documents.join_heads(outs)[..., :Dv].to(q.dtype)
