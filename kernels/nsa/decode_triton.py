"""Native Sparse Attention of one new token a sequence over a cache in Triton: four launches.

1. `compress_and_window`: attention of both branches split over their keys, and the scores;
2. `weigh_and_merge`: importances of the selection blocks (equation 9), of each share of them the heaviest, and beside it
   the parts of the first launch put together;
3. `select`: the top-n of those, and the chosen blocks' attention;
4. `finish`: its parts, and the gates.

Grids and memory follow from the shapes of the caches, nothing is read on the host, and what lies past a sequence's own
length is not touched: the launches can stand in a CUDA graph that is replayed while the sequences grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import overlap_options, overlaps, unit_stride
from sieve.kernels.common.split_keys import heads_together, parts_of
from sieve.kernels.nsa.compress_fwd import softmax_tile
from sieve.kernels.nsa.decode_compress import compress_and_window
from sieve.kernels.nsa.decode_select import finish, select
from sieve.kernels.nsa.decode_tiles import WEIGH_REGISTERS, DecodeTiles, heads_weighed, share_of, weigh_warps
from sieve.kernels.nsa.decode_weigh import weigh_and_merge
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.scores_topk import scores_tile, topk_row

COMPARED = 16384  # pairs of blocks that a program compares at once, a quarter where it holds the scores too


class Launches(NamedTuple):
    """The four launches in their order, and what they write to. near: int32 [B * Hkv], whether the choice hung by rounding."""

    calls: dict[str, Callable[[], object]]
    out: Tensor
    index: Tensor
    near: Tensor


def nsa_decode(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    query: Tensor, window_key: Tensor, longest: int, geometry: Geometry, *, scale: float,
    tiles: DecodeTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """See sieve.kernels.nsa.decode, n = 1: out [B, 1, H, Dv] and the selected blocks int32 [B, 1, Hkv, topk].

    window_key and longest play no part: sequences' own lengths and the caches' shapes do. Scratch memory: fp32 [B, H, C] and
    smaller. scale must be positive.
    Raises ValueError on more than one token a sequence, and for head dimensions without a kernel.
    """
    found = launches(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, query, geometry, scale=scale, tiles=tiles)
    for call in found.calls.values():
        call()
    return found.out, found.index


def launches(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    query: Tensor, geometry: Geometry, *, scale: float, tiles: DecodeTiles | None = None,
) -> Launches:
    """What nsa_decode launches, one by one, for who wants to time them."""
    (B, n, H, Dqk), (_, Hkv, S, Dv) = q.shape, v_slc.shape
    if n != 1:
        raise ValueError(f"q {list(q.shape)} has {n} tokens a sequence; the decode kernels take one")
    (d0, d1), (e0, e1) = split_dim(Dqk), split_dim(Dv)
    group, pairs, slots = H // Hkv, B * Hkv, k_cmp.shape[2]
    tiles = tiles or DecodeTiles.of(group, Dqk, Dv, q.dtype, q.device)
    first, chosen = tiles.first, tiles.select
    q, gates, query = q.contiguous(), gates.contiguous(), query.contiguous()
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = map(unit_stride, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win))

    row = triton.cdiv(slots, first.keys) + triton.cdiv(geometry.window_size, first.keys)
    parts = parts_of(pairs, row, tiles.programs)
    slc = parts_of(pairs, triton.cdiv(geometry.topk * geometry.block_size, chosen.keys), tiles.select_programs)
    padded = {count: triton.next_power_of_2(count) for count in (parts, parts + 1, slc)}
    width = triton.next_power_of_2(geometry.topk)
    a, b = geometry.block_size // geometry.kernel_stride, geometry.kernel_size // geometry.kernel_stride
    a_padded, b_padded = triton.next_power_of_2(a), triton.next_power_of_2(max(b - 1, 1))
    blocks = triton.cdiv(S, geometry.block_size)
    share = tiles.share or share_of(blocks, width)
    shares, kept = triton.cdiv(blocks, share), min(width, share)
    candidates = triton.next_power_of_2(shares * kept)
    mine = min(candidates, 128, COMPARED // width)
    lse_rows, lse_slots = softmax_tile(q[:, 0], Hkv, Dv, geometry)
    scores, group_padded = scores_tile(group, Dqk, q.dtype), triton.next_power_of_2(group)
    log_width, log_chunk, row_width = topk_row(geometry, S)
    step, together = heads_weighed(group, share, a_padded), heads_together(parts + 1, 64)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    score, mix = scratch(pairs, group, slots), scratch(B * H, Dv)
    o_first, stat_first = scratch(B * H, parts + 1, Dv), scratch(B * H, parts + 1, 2)
    o_slc, stat_slc = scratch(B * H, slc, Dv), scratch(B * H, slc, 2)
    rank, block = (scratch(pairs, shares, kept, dtype=torch.int32) for _ in range(2))
    rest, lse = scratch(pairs, shares, dtype=torch.int32), scratch(pairs, group)
    choice, own_and_next = scratch(pairs * slc, width, dtype=torch.int32), scratch(pairs * slc, 2 * row_width + group)
    index, near = scratch(B, 1, Hkv, geometry.topk, dtype=torch.int32), scratch(pairs, dtype=torch.int32)
    out = q.new_empty(B, 1, H, Dv)
    factor = scale / math.log(2)
    overlap = overlaps(pairs * parts, q.device) if tiles.overlap is None else tiles.overlap
    every = {"OVERLAP": overlap, **overlap_options(overlap)}
    shape = {"HEADS_KV": Hkv, "GROUP": group, "BLOCK": geometry.block_size, "TOPK": geometry.topk}
    forced = {"INIT": geometry.init_blocks, "LOCAL": geometry.local_blocks, "A_PADDED": a_padded}
    dims = {"D0": d0, "D1": d1, "E0": e0, "E1": e1}
    wide = {"DIM": Dv, "WIDE": triton.next_power_of_2(Dv)}
    kernel = {"KERNEL": geometry.kernel_size, "STRIDE": geometry.kernel_stride}
    cut = {"WINDOW": geometry.window_size, "PARTS": parts, "KEYS": first.keys}

    def compression_and_window() -> None:
        compress_and_window[(pairs, parts)](
            q, k_cmp, v_cmp, k_win, v_win, query, score, o_first, stat_first, *k_cmp.stride()[:3], *v_cmp.stride()[:3],
            *k_win.stride()[:3], *v_win.stride()[:3], slots, factor,
            ROWS=first.rows, **cut, **shape, **dims, **kernel, **every, **first.options,
        )  # fmt: skip

    def weights() -> None:
        weigh_and_merge[(pairs * shares + triton.cdiv(B * H, together),)](
            query, score, o_first, stat_first, gates, rank, block, rest, lse, mix, slots, pairs,
            B_PADDED=b_padded, SHARE=share, SHARES=shares, KEPT=kept, CHUNK=min(share, COMPARED // (4 * share)), STEP=step,
            PADDED=padded[parts], ALL_PADDED=padded[parts + 1], HEADS=together, **forced, **cut, **shape, **kernel, **wide,
            **every,
            num_warps=weigh_warps(share), maxnreg=WEIGH_REGISTERS if step >= group else None,
        )  # fmt: skip

    def selection() -> None:
        select[(pairs, slc)](
            q, k_slc, v_slc, k_cmp, query, score, rank, block, rest, lse, choice, own_and_next, index, near, o_slc, stat_slc,
            *k_slc.stride()[:3], *v_slc.stride()[:3], *k_cmp.stride()[:3], slots, factor, tiles.margin,
            WIDTH=width, SHARE=share, KEPT=kept, COUNT=shares * kept, MINE=mine, THEIRS=min(candidates, COMPARED // mine),
            SHARES_PADDED=triton.next_power_of_2(shares), SLC=slc, ROWS=chosen.rows, KEYS=chosen.keys,
            REACHED=triton.next_power_of_2(a + b - 1), PADDED=group_padded, ROW=own_and_next.shape[1],
            LOG_WIDTH=log_width, LOG_CHUNK=log_chunk, LSE_ROWS=lse_rows, LSE_SLOTS=lse_slots,
            COLUMNS=max(scores.rows, group_padded), SCORE_SLOTS=max(scores.slots, a_padded),
            **forced, **shape, **kernel, **dims, **every, **chosen.options,
        )  # fmt: skip

    def merge() -> None:
        heads = heads_together(slc, 16)
        finish[(triton.cdiv(B * H, heads),)](
            o_slc, stat_slc, gates, mix, out, B * H, SLC=slc, SLC_PADDED=padded[slc], HEADS=heads, num_warps=4, **wide, **every
        )

    calls = {
        "compression, window": compression_and_window, "weights": weights, "top-n, selection": selection, "merge": merge,
    }  # fmt: skip
    return Launches(calls, out, index, near)
