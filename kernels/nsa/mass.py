"""How much of full attention's weight lies in blocks of keys: what a selection catches, and the best one could.

For measurement alone: dense scores in query chunks, plain PyTorch, no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.common.chunks import over_chunks
from sieve.kernels.common.dense import compute_dtype, scores
from sieve.kernels.common.documents import Documents
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.reference import choose_blocks


def _mass(q: Tensor, k: Tensor, start: int, end: int, size: int, scale: float) -> Tensor:
    """q [B, K, G, n, D] of positions [start, end), k [B, K, m, D] -> weights by block [B, K, G, n, blocks]."""
    query = torch.arange(start, end, device=q.device)[:, None]
    key = torch.arange(end, device=q.device)
    p = torch.softmax(scores(q, k[:, :, :end], scale).masked_fill_(key > query, -torch.inf), -1)
    return torch.nn.functional.pad(p, (0, -end % size)).unflatten(-1, (-1, size)).sum(-1)


@torch.no_grad()
def oracle_blocks(
    q: Tensor, k_slc: Tensor, packing: Packing, geometry: Geometry, *, scale: float, chunk: int | None = None
) -> Tensor:
    """The blocks of which a KV group's heads together take most of full attention's weight: int32 [T, Hkv, topk] as of
    select_blocks, forced blocks included, ties to the lower block. q [T, H, Dqk], k_slc [T, Hkv, Dqk]."""
    dtype, groups, documents = compute_dtype(q), k_slc.shape[1], Documents.of(packing)
    found = []
    for batch in documents.batches:
        qb, kb = batch.heads(q.to(dtype), groups), batch.heads(k_slc.to(dtype), groups)[:, :, 0]

        def body(start: int, end: int, qb: Tensor, kb: Tensor) -> tuple[Tensor]:
            query = torch.arange(start, end, device=qb.device)[:, None]
            return (choose_blocks(_mass(qb, kb, start, end, geometry.block_size, scale).sum(2), query, geometry),)

        (parts,) = over_chunks(body, chunk, (qb,), kb)
        found.append(torch.cat(parts, 2).transpose(1, 2))
    return documents.join(found)


@torch.no_grad()
def recalled_mass(
    q: Tensor, k_slc: Tensor, indices: Tensor, packing: Packing, geometry: Geometry, *, scale: float, chunk: int | None = None
) -> Tensor:
    """Share of full attention's weight that lies in the blocks of `indices` int32 [T, Hkv, topk]: [T, H] in [0, 1]."""
    dtype, groups, documents = compute_dtype(q), k_slc.shape[1], Documents.of(packing)
    found = []
    for batch in documents.batches:
        qb, kb = batch.heads(q.to(dtype), groups), batch.heads(k_slc.to(dtype), groups)[:, :, 0]
        ib = batch.take(indices).transpose(1, 2)  # [B, Hkv, L, topk]

        def body(start: int, end: int, qb: Tensor, ib: Tensor, kb: Tensor) -> tuple[Tensor]:
            mass = _mass(qb, kb, start, end, geometry.block_size, scale)
            place = ib[:, :, None].clamp(0, mass.shape[-1] - 1).long().expand(-1, -1, mass.shape[2], -1, -1)
            # A padded query may name blocks that are not there; its row is dropped.
            return ((mass.gather(-1, place) * (ib >= 0)[:, :, None]).sum(-1, keepdim=True),)

        (parts,) = over_chunks(body, chunk, (qb, ib), kb)
        found.append(torch.cat(parts, 3))
    return documents.join_heads(found).squeeze(-1)
