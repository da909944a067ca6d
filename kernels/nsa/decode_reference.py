"""Native Sparse Attention of new tokens over a cache in plain PyTorch: the meaning of sieve.kernels.nsa.decode.

Compressed scores and the choice of blocks are those of sieve.kernels.nsa.reference, operation for operation. A matrix
product gives an element the same bits whatever the other rows and columns are only while there are whole tiles of both,
hence TILE: with equal q and compressed keys in fp32 the chosen blocks equal training's, ties included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.common.dense import attend, compute_dtype
from sieve.kernels.full.decode import cached_attention
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.reference import combine, rank_blocks, tokens_of_blocks

TILE = 16
CHUNK = 128  # queries whose scores are held at once on a CPU
CUDA_SCORES = 1 << 27  # scores held at once on a GPU, where many small chunks would wait for launches


def nsa_decode(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    query: Tensor, window_key: Tensor, longest: int, geometry: Geometry, *, scale: float,
) -> tuple[Tensor, Tensor]:
    """See sieve.kernels.nsa.decode: out [B, n, H, Dv] and the selected blocks int32 [B, n, Hkv, topk]."""
    dtype, Hkv = compute_dtype(q), k_slc.shape[1]
    heads = q.unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4).to(dtype)  # [B, Hkv, G, n, Dqk]
    compressed, selected, chosen = [], [], []
    step = chunk_for(q, longest)
    for start in range(0, q.shape[1], step):
        part, at = heads[:, :, :, start : start + step], query[:, start : start + step]
        o, indices = _compress_and_choose(part, k_cmp, v_cmp, at, longest, geometry, scale)
        compressed.append(o)
        chosen.append(indices)
        selected.append(_selected(part, k_slc, v_slc, at, indices, longest, geometry, scale))
    o_cmp, o_slc = (torch.cat(o, 3).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype) for o in (compressed, selected))
    o_win = cached_attention(
        q, k_win, v_win, query, window_key, scale=scale, window=geometry.window_size, impl="reference"
    )
    out = combine(*(o.flatten(0, 1) for o in (o_cmp, o_slc, o_win, gates))).unflatten(0, q.shape[:2])
    return out, torch.cat(chosen, 2).transpose(1, 2)


def chunk_for(q: Tensor, keys: int) -> int:
    """Queries of q [B, n, H, D] at a time, each with `keys` scores a head: a power of two of at least CHUNK."""
    if not q.is_cuda:
        return CHUNK
    each = max(q.shape[0] * q.shape[2] * keys, 1)
    return max(1 << (CUDA_SCORES // each).bit_length() >> 1, CHUNK)


def _compress_and_choose(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, query: Tensor, longest: int, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, Hkv, G, n, Dqk], query [B, n] -> the compression branch's [B, Hkv, G, n, Dv], and int32 [B, Hkv, n, topk]."""
    n, G = q.shape[3], q.shape[2]
    spare = max(0, -(-TILE // G) - n)
    if spare:
        q = torch.cat([q, q.new_zeros(*q.shape[:3], spare, q.shape[4])], 3)
        query = torch.cat([query, query[:, -1:].expand(-1, spare)], 1)
    l, d = geometry.kernel_size, geometry.kernel_stride
    width = min(-(-max(longest // d, 1) // TILE) * TILE, k_cmp.shape[2])
    kb, vb = k_cmp[:, :, :width].to(q.dtype), v_cmp[:, :, :width].to(q.dtype)
    at = query[:, None, :, None]  # [B, 1, n, 1]
    seen = (torch.arange(width, device=q.device) * d + l - 1 <= at)[:, :, None]  # [B, 1, 1, n, width]
    o, lse = attend(q, kb, vb, seen, scale)
    num_blocks = (longest - 1) // geometry.block_size + 1
    indices = rank_blocks(q, lse[..., None], kb, seen, at, num_blocks, geometry, scale)
    return o[:, :, :, :n], indices[:, :, :n]


def _selected(
    q: Tensor, k_slc: Tensor, v_slc: Tensor, query: Tensor, indices: Tensor, longest: int, geometry: Geometry,
    scale: float,
) -> Tensor:
    """The selection branch's [B, Hkv, G, n, Dv]: one query gathers its blocks, several mask all keys."""
    at = query[:, None, :, None]
    if q.shape[3] == 1:
        inside = torch.arange(geometry.block_size, device=q.device)
        token = (indices.long()[..., None] * geometry.block_size + inside).flatten(-2)  # [B, Hkv, 1, topk * l']
        visible = (token >= 0) & (token <= at)
        token = token.clamp(0, k_slc.shape[2] - 1).transpose(2, 3)
        k, v = (x.gather(2, token.expand(-1, -1, -1, x.shape[3])).to(q.dtype) for x in (k_slc, v_slc))
    else:
        k, v = (x[:, :, :longest].to(q.dtype) for x in (k_slc, v_slc))
        position = torch.arange(k.shape[2], device=q.device)
        visible = tokens_of_blocks(indices, k.shape[2], geometry) & (position <= at)
    return attend(q, k, v, visible[:, :, None], scale)[0]
