"""Which blocks new tokens read, by training's own kernels over a cache: equal to training's choice to the last bit.

The decode kernels split a sequence's compressed keys among programs, and so add a softmax's sum in another order than training
does: where two blocks' importances agree to the last bits, they may take the other one. Here every pair of a sequence and a KV
head stands for a document of one KV head, its places in the cache for the document's slots, and training's results do not
depend on what else lies in the row. Each query fills a tile of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.nsa.compress_fwd import compressed_attention_fwd, tokens_together
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.scores_topk import select_blocks


def choose(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, query: Tensor, longest: int, geometry: Geometry, *, scale: float
) -> Tensor:
    """int32 [B, 1, Hkv, topk], as select_blocks chooses; arguments as nsa_decode's, q [B, 1, H, Dqk]."""
    (B, Hkv, C, _), pairs = k_cmp.shape, k_cmp.shape[0] * k_cmp.shape[1]
    heads = q.unflatten(2, (Hkv, -1)).flatten(0, 2)  # [B * Hkv, G, Dqk]
    copies = tokens_together(heads, 1, v_cmp.shape[3], geometry)  # of each query
    pair = torch.arange(pairs + 1, dtype=torch.int32, device=q.device)
    packing = Packing(
        pair * (C * geometry.kernel_stride), pair[:-1].repeat_interleave(copies),
        query.expand(-1, Hkv).flatten().repeat_interleave(copies), longest,
    )
    heads = heads.repeat_interleave(copies, 0)
    k, v = (x.reshape(pairs * C, 1, -1) for x in (k_cmp, v_cmp))
    _, lse = compressed_attention_fwd(heads, k, v, packing, geometry, scale=scale)
    return select_blocks(heads, k, lse, packing, geometry, scale=scale)[::copies].view(B, 1, Hkv, -1)
