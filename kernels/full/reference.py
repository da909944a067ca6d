"""Causal and sliding-window attention over packed documents in plain PyTorch, in query chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.common.chunks import over_chunks
from sieve.kernels.common.dense import attend, compute_dtype
from sieve.kernels.common.documents import Documents
from sieve.kernels.nsa.layout import Packing


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, *, scale: float, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each query attends to the keys of its document up to its own, the last `window` of them if given.

    q [T, H, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv] -> o [T, H, Dv] in q's dtype, lse [T, H] in fp32 (fp64 for fp64).
    """
    dtype = compute_dtype(q)
    documents = Documents.of(packing)
    outs, lses = [], []
    for batch in documents.batches:
        qb, kb, vb = (batch.heads(x.to(dtype), k.shape[1]) for x in (q, k, v))

        def body(start: int, end: int, qb: Tensor, kb: Tensor, vb: Tensor) -> tuple[Tensor, Tensor]:
            low = 0 if window is None else max(0, start - window + 1)
            query = torch.arange(start, end, device=qb.device)[:, None]
            key = torch.arange(low, end, device=qb.device)
            visible = key <= query
            if window is not None:
                visible = visible & (key > query - window)
            return attend(qb, kb[:, :, 0, low:end], vb[:, :, 0, low:end], visible, scale)

        o, lse = over_chunks(body, chunk, (qb,), kb, vb)
        outs.append(torch.cat(o, 3))
        lses.append(torch.cat(lse, 3))
    return documents.join_heads(outs).to(q.dtype), documents.join_heads(lses)
