"""Decoding's correctness before its speed: outputs against float64, the choice of blocks by their importance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sieve.kernels.common.dense import attend, scores
from sieve.kernels.full.decode import cached_attention
from sieve.kernels.nsa import reference
from sieve.kernels.nsa.decode import Impl, nsa_decode
from sieve.kernels.nsa.decode_reference import _selected
from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts.bench.cases import Shape
from sieve.scripts.bench.decode_cases import DecodeCase, draw

LIMIT = 1.5e-2  # of the output's error in norm, in bf16
LIGHTER = 1e-3  # by which share a chosen block may be lighter than one left out


def weigh(
    q: Tensor, k_cmp: Tensor, query: Tensor, indices: Tensor, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [B, Hkv, n] each, in float64: the importance of the lightest block that is chosen for it, and not because it must
    be, that of the heaviest which is left out, and that of all. A choice that lacks blocks is as if it left out one of inf.

    q [B, Hkv, G, n, Dqk], k_cmp [B, Hkv, C, Dqk], query int [B, n], indices int32 [B, Hkv, n, topk].
    """
    g, q, k_cmp, at = geometry, q.double(), k_cmp.double(), query[:, None, :, None]
    slot = torch.arange(k_cmp.shape[2], device=q.device) * g.kernel_stride + g.kernel_size - 1
    seen = (slot <= at)[:, :, None]
    s = scores(q, k_cmp, scale).masked_fill(~seen, -math.inf)
    p = (s - s.logsumexp(-1, keepdim=True)).masked_fill(~seen, -math.inf).exp().sum(2)
    current = at // g.block_size
    blocks = int(current.max()) + 1
    rank = reference._importance(p, blocks, g)  # [B, Hkv, n, blocks]
    total, block = rank.sum(-1), torch.arange(blocks, device=q.device)
    forced = (block < g.init_blocks) | (block > current - g.local_blocks)
    rank = rank.masked_fill(forced, math.inf).masked_fill(block > current, -math.inf)
    chosen = torch.zeros(*rank.shape[:-1], blocks + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(3, indices.long().masked_fill(indices < 0, blocks), True)[..., :-1]
    least = rank.masked_fill(~chosen, math.inf).amin(-1)
    left = rank.masked_fill(chosen, -math.inf).amax(-1).clamp(min=0)
    full = (indices >= 0).sum(-1) == (current[..., 0] + 1).clamp(max=g.topk)
    return least, torch.where(full, left, math.inf), total


def _exact(case: DecodeCase, indices: Tensor) -> tuple[Tensor, float]:
    """The output in float64 for the given indices, and by how much the worst choice is lighter than what was left out."""
    g, wide = case.geometry, [x.double() for x in (case.q, *case.kv, case.gates)]
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = wide
    heads = q.unflatten(2, (case.shape.kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, 1, D]
    slot = torch.arange(k_cmp.shape[2], device=q.device) * g.kernel_stride + g.kernel_size - 1
    o_cmp, _ = attend(heads, k_cmp, v_cmp, (slot <= case.query[:, None, :, None])[:, :, None], case.scale)
    picked = indices.transpose(1, 2)
    o_slc = _selected(heads, k_slc, v_slc, case.query, picked, case.longest, g, case.scale)
    o_win = cached_attention(
        q, k_win, v_win, case.query, case.window_key, scale=case.scale, window=g.window_size, impl="reference"
    )
    outs = [o.permute(0, 3, 1, 2, 4).flatten(2, 3) for o in (o_cmp, o_slc)] + [o_win]
    out = reference.combine(*(x.flatten(0, 1) for x in (*outs, gates))).view_as(o_win)
    least, left, _ = weigh(heads, k_cmp, case.query, picked, g, case.scale)
    return out, float((left / least.clamp(min=1e-300)).max()) - 1


def check(shape: Shape, geometry: Geometry, *, device: str = "cuda", impl: Impl = "triton", dtype: torch.dtype = torch.bfloat16,
          tokens: int = 5000) -> dict[str, float]:  # fmt: skip
    """Errors of NSA's and of full attention's decoding on a batch of lengths around the boundaries, in a larger cache.

    Raises RuntimeError where one is out of bounds: no speed is reported of a wrong result.
    """
    edges = (geometry.kernel_size, geometry.topk * geometry.block_size, geometry.window_size)
    lengths = sorted({1, *(n + off for n in edges for off in (-1, 0, 1)), tokens, tokens - 1777})
    case = draw(shape, [n for n in lengths if 0 < n <= tokens], geometry, tokens + 300, device=device, dtype=dtype)
    out, indices = nsa_decode(
        case.q, *case.kv, case.gates, case.query, case.window_key, case.longest, geometry, scale=case.scale, impl=impl
    )
    want, lighter = _exact(case, indices)
    k, v = case.kv[2:4]
    dense = cached_attention(
        case.q, k, v, case.query, None, scale=case.scale, impl="triton" if impl == "triton" else "reference"
    )
    full = cached_attention(
        case.q.double(), k.double(), v.double(), case.query, None, scale=case.scale, impl="reference"
    )
    found = {
        "out": max(((a - b).norm() / b.norm()).item() for a, b in zip(out.double(), want)),
        "full": max(((a - b).norm() / b.norm()).item() for a, b in zip(dense.double(), full)),
        "lighter": max(lighter, 0.0),
    }
    limits = {"out": LIMIT, "full": LIMIT, "lighter": LIGHTER}
    wrong = {name: value for name, value in found.items() if not value <= limits[name]}  # NaN is wrong too
    if wrong:
        raise RuntimeError(f"{shape}: out of bounds {wrong}, bounds {limits}")
    return found
