"""Native Sparse Attention for CPUs: the reference with its two costly branches through scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.common.chunks import over_chunks
from sieve.kernels.common.documents import Documents
from sieve.kernels.full.sdpa import attend_fused, fused_dtype, one_head_size, sdpa_attention
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.reference import combine, compressed_attention, select_blocks, selected_tokens

CHUNK = 512  # queries whose compressed scores, or selection mask, are held at once


def selected_attention(
    q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, packing: Packing, geometry: Geometry, *, scale: float,
    chunk: int = CHUNK,
) -> Tensor:
    """As reference.selected_attention, for `indices` of select_blocks alone, without the lse: -> o [T, H, Dv].

    Up to topk * block_size tokens into a document every block is selected, so that this part is causal attention.
    """
    documents = Documents.of(packing)
    groups, Dv = k_slc.shape[1], v_slc.shape[2]
    padded = one_head_size(*(x.to(fused_dtype(x)) for x in (q, k_slc, v_slc)))
    outs = []
    for batch in documents.batches:
        qb, kb, vb = (batch.heads(x, groups) for x in padded)
        whole = min(geometry.topk * geometry.block_size, batch.length)
        near, far = qb.split([whole, batch.length - whole], 3)
        parts = [attend_fused(near, kb[:, :, :, :whole], vb[:, :, :, :whole], None, scale)]
        if whole < batch.length:
            ib = batch.take(indices).transpose(1, 2)[:, :, whole:]  # [B, Hkv, L - whole, topk]

            def body(
                start: int, end: int, qb: Tensor, ib: Tensor, kb: Tensor, vb: Tensor, whole: int = whole
            ) -> tuple[Tensor]:
                first, last = whole + start, whole + end
                visible = selected_tokens(ib, first, last, geometry).flatten(0, 1)[:, None]
                return (attend_fused(qb, kb[:, :, :, :last], vb[:, :, :, :last], visible, scale),)

            (rest,) = over_chunks(body, chunk, (far, ib), kb, vb)
            parts += rest
        outs.append(torch.cat(parts, 3))
    return documents.join_heads(outs)[..., :Dv].to(q.dtype)


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float,
) -> tuple[Tensor, Tensor]:
    """The whole operator, see sieve.kernels.nsa.api: out [T, H, Dv] and the selected blocks int32 [T, Hkv, topk]."""
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, packing, geometry, scale=scale, chunk=CHUNK)
    indices = select_blocks(q, k_cmp, lse, packing, geometry, scale=scale, chunk=CHUNK)
    o_slc = selected_attention(q, k_slc, v_slc, indices, packing, geometry, scale=scale)
    o_win = sdpa_attention(q, k_win, v_win, packing, geometry.window_size, scale=scale)
    return combine(o_cmp, o_slc, o_win, gates), indices
