"""Native Sparse Attention in plain PyTorch, any device, any float dtype: the meaning the kernels are tested against.

Documents run in padded batches and query chunks with dense masked scores, so that memory grows with tokens times the
chunk. Half-precision inputs are computed in fp32; fp64 stays fp64. Source: arXiv 2502.11089.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sieve.kernels.common.chunks import over_chunks
from sieve.kernels.common.dense import attend, compute_dtype, scores
from sieve.kernels.common.documents import Documents
from sieve.kernels.full.reference import causal_attention
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing


def _blocks_before(end: int, geometry: Geometry) -> int:
    """How many compressed blocks lie wholly before position `end`."""
    return max(0, (end - geometry.kernel_size) // geometry.kernel_stride + 1)


def _blocks_seen(start: int, end: int, geometry: Geometry, device: torch.device) -> Tensor:
    """bool [end - start, blocks]: whether query t sees compressed block i, that is i * d + l - 1 <= t."""
    query = torch.arange(start, end, device=device)[:, None]
    block = torch.arange(_blocks_before(end, geometry), device=device)
    return block * geometry.kernel_stride + geometry.kernel_size - 1 <= query


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, packing: Packing, geometry: Geometry, *, scale: float, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Equations 7 and 8: attention over the compressed blocks that end at or before the query.

    q [T, H, Dqk], k_cmp [C, Hkv, Dqk], v_cmp [C, Hkv, Dv] in slots (CompressedSlots) -> o [T, H, Dv] in q's dtype,
    lse [T, H] in fp32 (fp64 for fp64). A query that sees no block has o exactly 0 and lse -inf.
    """
    dtype, groups = compute_dtype(q), k_cmp.shape[1]
    documents = Documents.of(packing)
    outs, lses = [], []
    for batch in documents.batches:
        qb = batch.heads(q.to(dtype), groups)
        kb, vb = (batch.slots(x.to(dtype), geometry.kernel_stride) for x in (k_cmp, v_cmp))

        def body(start: int, end: int, qb: Tensor, kb: Tensor, vb: Tensor) -> tuple[Tensor, Tensor]:
            seen = _blocks_seen(start, end, geometry, qb.device)
            n = seen.shape[1]
            return attend(qb, kb[:, :, :n], vb[:, :, :n], seen, scale)

        o, lse = over_chunks(body, chunk, (qb,), kb, vb)
        outs.append(torch.cat(o, 3))
        lses.append(torch.cat(lse, 3))
    return documents.join_heads(outs).to(q.dtype), documents.join_heads(lses)


def _importance(p: Tensor, num_blocks: int, geometry: Geometry) -> Tensor:
    """Equation 9 read 0-based: p [..., blocks] of compressed blocks -> [..., num_blocks] of selection blocks.

    A sum of shifted slices rather than a matrix product: blocks with equal weights get bit-equal sums, so that ties
    stay ties.
    """
    step = geometry.block_size // geometry.kernel_stride
    before = geometry.kernel_size // geometry.kernel_stride - 1
    after = step * num_blocks + len(geometry.overlap) - before - p.shape[-1]
    p = torch.nn.functional.pad(p, (before, after))
    return sum(w * p[..., m : m + step * num_blocks : step] for m, w in enumerate(geometry.overlap))


def rank_blocks(
    q: Tensor, lse: Tensor, k_cmp: Tensor, seen: Tensor, query: Tensor, num_blocks: int, geometry: Geometry, scale: float
) -> Tensor:
    """Equations 9 to 12 for queries of documents, in training and with a cache alike: equal scores, equal choice.

    q [B, K, G, n, D], lse [B, K, G, n, 1], k_cmp [B, K, blocks, D], all of the computation's dtype; query: positions,
    [n, 1] or [B, 1, n, 1]; seen: bool, which of the compressed blocks a query sees, [n, blocks] or [B, 1, 1, n, blocks].
    num_blocks: how many selection blocks the last query may choose from. -> int32 [B, K, n, topk] as in select_blocks.
    """
    if num_blocks <= geometry.topk:  # every candidate is chosen, whatever its importance
        return choose_blocks(q.new_zeros(*q.shape[:2], q.shape[3], num_blocks), query, geometry)
    s = scores(q, k_cmp, scale) - lse
    p = s.masked_fill_(~seen, -math.inf).exp_().sum(2)  # [B, K, n, blocks]
    return choose_blocks(_importance(p, num_blocks, geometry), query, geometry)


def choose_blocks(importance: Tensor, query: Tensor, geometry: Geometry) -> Tensor:
    """importance [B, K, n, J], overwritten, and query as in rank_blocks -> int32 [B, K, n, topk]: the forced blocks and
    the most important others up to the query's own, ascending, -1 past the last."""
    num_blocks = importance.shape[-1]
    block = torch.arange(num_blocks, device=importance.device)
    current = query // geometry.block_size
    candidate = block <= current  # [n, J] or [B, 1, n, J]
    if num_blocks <= geometry.topk:
        chosen = torch.where(candidate, block, -1).expand(*importance.shape[:2], -1, -1)
    else:
        forced = (block < geometry.init_blocks) | (block > current - geometry.local_blocks)
        rank = importance.masked_fill_(forced, math.inf).masked_fill_(~candidate, -math.inf)
        # Not torch.topk, which breaks ties as it likes.
        order = rank.sort(dim=-1, descending=True, stable=True).indices[..., : geometry.topk]
        chosen = order.masked_fill(order > current, -1)
    # Ascending with -1 last.
    chosen = chosen.masked_fill(chosen < 0, num_blocks).sort(-1).values
    chosen = chosen.masked_fill(chosen == num_blocks, -1)
    return torch.nn.functional.pad(chosen, (0, geometry.topk - chosen.shape[-1]), value=-1).int()


@torch.no_grad()
def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, packing: Packing, geometry: Geometry, *, scale: float, chunk: int | None = None
) -> Tensor:
    """Equations 9 to 12: the selection blocks each query and KV group reads.

    q [T, H, Dqk], k_cmp [C, Hkv, Dqk], lse [T, H] of compressed_attention -> int32 [T, Hkv, topk], block numbers
    within the document, ascending, -1 past the last. Forced blocks are always among them, then the largest importance,
    ties to the lower block. No gradient.
    """
    dtype, groups = compute_dtype(q), k_cmp.shape[1]
    documents = Documents.of(packing)
    found = []
    for batch in documents.batches:
        qb, lb = batch.heads(q.to(dtype), groups), batch.heads(lse[..., None].to(dtype), groups)
        kb = batch.slots(k_cmp.to(dtype), geometry.kernel_stride)

        def body(start: int, end: int, qb: Tensor, lb: Tensor, kb: Tensor) -> tuple[Tensor]:
            query = torch.arange(start, end, device=qb.device)[:, None]
            seen = _blocks_seen(start, end, geometry, qb.device)
            num_blocks = (end - 1) // geometry.block_size + 1
            return (rank_blocks(qb, lb, kb[:, :, : seen.shape[1]], seen, query, num_blocks, geometry, scale),)

        (parts,) = over_chunks(body, chunk, (qb, lb), kb)
        found.append(torch.cat(parts, 2).transpose(1, 2))
    return documents.join(found)


def tokens_of_blocks(indices: Tensor, end: int, geometry: Geometry) -> Tensor:
    """Which of a document's first `end` tokens lie in selected blocks: indices [..., n, topk] -> bool [..., n, end]."""
    num_blocks = (end - 1) // geometry.block_size + 1
    # One spare column takes the -1 entries.
    on = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool, device=indices.device)
    on.scatter_(-1, torch.where(indices < 0, num_blocks, indices.long()), True)
    return on[..., :-1, None].expand(*on.shape[:-1], num_blocks, geometry.block_size).flatten(-2)[..., :end]


def selected_tokens(indices: Tensor, start: int, end: int, geometry: Geometry) -> Tensor:
    """What queries [start, end) of a document read: their indices [..., n, topk] -> bool [..., n, end]."""
    position = torch.arange(end, device=indices.device)
    return tokens_of_blocks(indices, end, geometry) & (position <= position[start:, None])


def selected_attention(
    q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, packing: Packing, geometry: Geometry, *, scale: float,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected blocks, up to the query's own.

    q [T, H, Dqk], k_slc [T, Hkv, Dqk], v_slc [T, Hkv, Dv], indices [T, Hkv, topk] (-1 = none) -> o [T, H, Dv] in q's
    dtype, lse [T, H] in fp32 (fp64 for fp64).
    """
    dtype, groups = compute_dtype(q), k_slc.shape[1]
    documents = Documents.of(packing)
    outs, lses = [], []
    for batch in documents.batches:
        qb, kb, vb = (batch.heads(x.to(dtype), groups) for x in (q, k_slc, v_slc))
        ib = batch.take(indices).transpose(1, 2)  # [B, Hkv, L, topk]

        def body(start: int, end: int, qb: Tensor, ib: Tensor, kb: Tensor, vb: Tensor) -> tuple[Tensor, Tensor]:
            visible = selected_tokens(ib, start, end, geometry)[:, :, None]
            return attend(qb, kb[:, :, 0, :end], vb[:, :, 0, :end], visible, scale)

        o, lse = over_chunks(body, chunk, (qb, ib), kb, vb)
        outs.append(torch.cat(o, 3))
        lses.append(torch.cat(lse, 3))
    return documents.join_heads(outs).to(q.dtype), documents.join_heads(lses)


def window_attention(
    q: Tensor, k_win: Tensor, v_win: Tensor, packing: Packing, window_size: int, *, scale: float, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the last window_size tokens of the document, the query's own included.

    q [T, H, Dqk], k_win [T, Hkv, Dqk], v_win [T, Hkv, Dv] -> o [T, H, Dv] in q's dtype, lse [T, H] in fp32 (fp64 for
    fp64).
    """
    return causal_attention(q, k_win, v_win, packing, window_size, scale=scale, chunk=chunk)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Equation 5: the branches' outputs [T, H, Dv] weighed by gates [T, H, 3] (compression, selection, window)."""
    dtype = compute_dtype(o_cmp)
    g = gates.to(dtype).unsqueeze(-1)
    return (g[:, :, 0] * o_cmp.to(dtype) + g[:, :, 1] * o_slc.to(dtype) + g[:, :, 2] * o_win.to(dtype)).to(o_cmp.dtype)


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole operator, see sieve.kernels.nsa.api: out [T, H, Dv] and the selected blocks int32 [T, Hkv, topk]."""
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, packing, geometry, scale=scale, chunk=chunk)
    indices = select_blocks(q, k_cmp, lse, packing, geometry, scale=scale, chunk=chunk)
    o_slc, _ = selected_attention(q, k_slc, v_slc, indices, packing, geometry, scale=scale, chunk=chunk)
    o_win, _ = window_attention(q, k_win, v_win, packing, geometry.window_size, scale=scale, chunk=chunk)
    return combine(o_cmp, o_slc, o_win, gates), indices
