"""Native Sparse Attention of one new token a sequence over a cache in Triton: four launches.

1. `compress`: compression attention split over its keys, and the scores;
2. `weigh_and_window`: importances of the selection blocks (equation 9), and the window's attention;
3. `select`: the top-n, and the selected blocks' attention;
4. `_merge`: the parts of each branch, and the gates.

Grids and memory follow from the shapes of the caches, nothing is read on the host, and what lies past a sequence's own
length is not touched: the launches can stand in a CUDA graph that is replayed while the sequences grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.split_keys import Tile, decode_tile, merged, parts_of
from sieve.kernels.nsa.compress_tiles import multiprocessors, unit_stride
from sieve.kernels.nsa.decode_compress import compress
from sieve.kernels.nsa.decode_select import select, weigh_and_window
from sieve.kernels.nsa.geometry import Geometry

# Blocks sorted together: the network's steps are waits, so few large ones; of 2048, 128k tokens, each of 128 threads has 16.
LOG_CHUNK_LEAST, LOG_CHUNK_MOST = 7, 11
WEIGHED = 64  # compressed slots a step of `_weigh`


@triton.jit(do_not_specialize=["parts"])
def _merge(
    o_ptr, stat_ptr, gate_ptr, out_ptr, parts, CMP: tl.constexpr, CMP_PADDED: tl.constexpr, WIN: tl.constexpr,
    WIN_PADDED: tl.constexpr, SLC: tl.constexpr, SLC_PADDED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (B * H): out = the branches' attention, weighed by the gates (compression, selection, window)."""
    head = tl.program_id(0)
    gate_ptr += head * 3
    out = tl.load(gate_ptr).to(tl.float32) * merged(o_ptr, stat_ptr, head, 0, parts, CMP, CMP_PADDED, DIM, WIDE)
    out += tl.load(gate_ptr + 1).to(tl.float32) * merged(o_ptr, stat_ptr, head, CMP + WIN, parts, SLC, SLC_PADDED, DIM, WIDE)
    out += tl.load(gate_ptr + 2).to(tl.float32) * merged(o_ptr, stat_ptr, head, CMP, parts, WIN, WIN_PADDED, DIM, WIDE)
    column = tl.arange(0, WIDE)
    tl.store(out_ptr + head.to(tl.int64) * DIM + column, out.to(out_ptr.dtype.element_ty), mask=column < DIM)


class Launches(NamedTuple):
    """The four launches in their order, what they write to, and the number of each branch's parts."""

    calls: dict[str, Callable[[], object]]
    out: Tensor
    index: Tensor
    parts: dict[str, int]


def nsa_decode(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    query: Tensor, window_key: Tensor, longest: int, geometry: Geometry, *, scale: float, tile: Tile | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See sieve.kernels.nsa.decode, n = 1: out [B, 1, H, Dv] and the selected blocks int32 [B, 1, Hkv, topk].

    window_key and longest play no part: sequences' own lengths and the caches' shapes do. programs: about how many run
    at once (None: two a multiprocessor). Scratch memory: fp32 [B, H, C] and smaller. scale must be positive.
    Raises ValueError on more than one token a sequence, and for head dimensions without a kernel.
    """
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, query)
    found = launches(*tensors, geometry, scale=scale, tile=tile, programs=programs)
    for call in found.calls.values():
        call()
    return found.out, found.index


def launches(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    query: Tensor, geometry: Geometry, *, scale: float, tile: Tile | None = None, programs: int | None = None,
) -> Launches:
    """What nsa_decode launches, one by one, for who wants to time them."""
    (B, n, H, Dqk), (_, Hkv, S, Dv) = q.shape, v_slc.shape
    if n != 1:
        raise ValueError(f"q {list(q.shape)} has {n} tokens a sequence; the decode kernels take one")
    (d0, d1), (e0, e1) = split_dim(Dqk), split_dim(Dv)
    group, pairs, slots = H // Hkv, B * Hkv, k_cmp.shape[2]
    tile = tile or decode_tile(group, Dqk, Dv, q.dtype)
    programs = programs or 2 * multiprocessors(q.device)
    q, gates, query = q.contiguous(), gates.contiguous(), query.contiguous()
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = map(unit_stride, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win))

    cmp = parts_of(pairs, triton.cdiv(slots, tile.keys), programs)
    win = parts_of(pairs, triton.cdiv(geometry.window_size, tile.keys), programs)
    slc = parts_of(pairs, triton.cdiv(geometry.topk * geometry.block_size, tile.keys), programs)
    parts = cmp + win + slc
    a_padded = triton.next_power_of_2(geometry.block_size // geometry.kernel_stride)
    weighed = max(WEIGHED, a_padded)
    blocks = triton.cdiv(S, geometry.block_size)
    weigh = parts_of(pairs, triton.cdiv(blocks, weighed // a_padded), 2 * programs)
    log_width = (geometry.topk - 1).bit_length()
    log_chunk = max(min(blocks.bit_length(), LOG_CHUNK_MOST), LOG_CHUNK_LEAST, log_width)
    width = ((blocks >> log_chunk) + 1) << log_chunk  # whole chunks, and room for what the last block counts for its next

    def scratch(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    score, rank = scratch(pairs, group, slots), scratch(pairs, 2, width)
    o, stat = scratch(B * H, parts, Dv), scratch(B * H, parts, 2)
    index = q.new_empty((slc, B, 1, Hkv, geometry.topk), dtype=torch.int32)
    out = q.new_empty(B, 1, H, Dv)
    factor = scale / math.log(2)
    shape = {
        "HEADS_KV": Hkv, "GROUP": group, "D0": d0, "D1": d1, "E0": e0, "E1": e1, "KERNEL": geometry.kernel_size,
        "STRIDE": geometry.kernel_stride, "BLOCK": geometry.block_size, "TOPK": geometry.topk, "ROWS": tile.rows,
        "KEYS": tile.keys,
    }
    padded = {count: triton.next_power_of_2(count) for count in (cmp, win, slc)}

    def compression() -> None:
        compress[(pairs, cmp)](
            q, k_cmp, v_cmp, query, score, o, stat, *k_cmp.stride()[:3], *v_cmp.stride()[:3], slots, parts, factor,
            PARTS=cmp, **shape, **tile.options,
        )  # fmt: skip

    def weights_and_window() -> None:
        weigh_and_window[(pairs, win + weigh)](
            q, k_win, v_win, query, score, rank, o, stat, *k_win.stride()[:3], *v_win.stride()[:3], slots, parts, width,
            factor, PADDED=triton.next_power_of_2(group), WINDOW=geometry.window_size, A_PADDED=a_padded, CMP=cmp,
            CMP_PADDED=padded[cmp], WEIGH=weigh, WIN=win, SLOTS=weighed, **shape, **tile.options,
        )  # fmt: skip

    def selection() -> None:
        select[(pairs, slc)](
            q, k_slc, v_slc, query, rank, index, o, stat, *k_slc.stride()[:3], *v_slc.stride()[:3], slots, parts, width,
            factor, INIT=geometry.init_blocks, LOCAL=geometry.local_blocks, LOG_WIDTH=log_width, LOG_CHUNK=log_chunk,
            BEFORE=cmp + win, PARTS=slc, **shape, **tile.options,
        )  # fmt: skip

    def merge() -> None:
        _merge[(B * H,)](
            o, stat, gates, out, parts, CMP=cmp, CMP_PADDED=padded[cmp], WIN=win, WIN_PADDED=padded[win], SLC=slc,
            SLC_PADDED=padded[slc], DIM=Dv, WIDE=triton.next_power_of_2(Dv), num_warps=4,
        )  # fmt: skip

    calls = {"compression": compression, "weights, window": weights_and_window, "top-n, selection": selection, "merge": merge}
    return Launches(calls, out, index[0], {"compression": cmp, "window": win, "selection": slc})
