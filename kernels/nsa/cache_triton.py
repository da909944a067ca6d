"""One new token of every sequence into an NSA layer's caches, in one launch; the block that it may complete, in another.

The same in PyTorch is some twenty small launches (sieve.model.cache). Grids follow from shapes, nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.launch import after_earlier, can_overlap, overlap_options, unit_stride
from sieve.kernels.nsa.geometry import Geometry


class Stores(NamedTuple):
    """Of one branch, contiguous: what the new token brings, k [B, Hkv, Dqk] and v [B, Hkv, Dv], and the caches it goes to,
    keys [B, Hkv, places, Dqk] and values [B, Hkv, places, Dv]."""

    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor


@triton.jit
def _put(new_ptr, cache_ptr, pair, places, place, DIM: tl.constexpr, WIDE: tl.constexpr):
    """The pair's new row to its `place`."""
    column = tl.arange(0, WIDE)
    x = tl.load(new_ptr + pair * DIM + column, mask=column < DIM)
    tl.store(cache_ptr + (pair.to(tl.int64) * places + place) * DIM + column, x, mask=column < DIM)


@triton.jit
def blocks_of(length, L: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed blocks `length` tokens complete."""
    return tl.maximum(length + STRIDE - L, 0) // STRIDE


@triton.jit
def _pass_through(
    new_ptr, raw_ptr, joined_ptr, pair, held, shift, HEADS: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """joined [B, L, Hkv, DIM]: the `held` tokens kept and the new one, which fills the rest; raw: the same from `shift` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDE)[None, :]
    inside = (row < L) & (column < DIM)
    new = tl.load(new_ptr + pair * DIM + column, mask=column < DIM)
    raw_at = raw_ptr + pair.to(tl.int64) * (L * DIM) + row * DIM + column
    now = tl.where(row < held, tl.load(raw_at, mask=inside & (row < held)), new)
    later = tl.where(row + shift < held, tl.load(raw_at + shift * DIM, mask=inside & (row + shift < held)), new)
    tl.debug_barrier()  # rows are written that other threads read
    at = ((pair // HEADS).to(tl.int64) * L + row) * HEADS + pair % HEADS
    tl.store(joined_ptr + at * DIM + column, now, mask=inside)
    tl.store(raw_at, later, mask=inside)


@triton.jit(do_not_specialize=["places"])
def _store_token(
    past_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, k_win_ptr, v_win_ptr, win_keys_ptr, win_values_ptr,
    k_raw_ptr, v_raw_ptr, raw_keys_ptr, raw_values_ptr, k_joined_ptr, v_joined_ptr, places,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    DK: tl.constexpr, WK: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv)."""
    pair = tl.program_id(0)
    after_earlier(OVERLAP)
    past = tl.load(past_ptr + pair // HEADS)
    _put(k_ptr, keys_ptr, pair, places, past, DK, WK)
    _put(v_ptr, values_ptr, pair, places, past, DV, WV)
    _put(k_win_ptr, win_keys_ptr, pair, WINDOW, past % WINDOW, DK, WK)
    _put(v_win_ptr, win_values_ptr, pair, WINDOW, past % WINDOW, DV, WV)
    first = blocks_of(past, L, STRIDE) * STRIDE
    shift = blocks_of(past + 1, L, STRIDE) * STRIDE - first
    _pass_through(k_raw_ptr, raw_keys_ptr, k_joined_ptr, pair, past - first, shift, HEADS, L, ROWS, DK, WK)
    _pass_through(v_raw_ptr, raw_values_ptr, v_joined_ptr, pair, past - first, shift, HEADS, L, ROWS, DV, WV)


@triton.jit(do_not_specialize=["places"])
def _store_block(
    past_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, stride_kn, stride_kh, stride_vn, stride_vh, places,
    HEADS: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, DK: tl.constexpr, WK: tl.constexpr, DV: tl.constexpr,
    WV: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv). k, v [B, L / STRIDE, Hkv, D]: a sequence's first may be complete now, no other."""
    pair = tl.program_id(0)
    after_earlier(OVERLAP)
    past = tl.load(past_ptr + pair // HEADS)
    number = blocks_of(past, L, STRIDE)
    if blocks_of(past + 1, L, STRIDE) > number:
        slot = pair // HEADS * (L // STRIDE)
        to = pair.to(tl.int64) * places + number
        column = tl.arange(0, WK)
        x = tl.load(k_ptr + slot * stride_kn + pair % HEADS * stride_kh + column, mask=column < DK)
        tl.store(keys_ptr + to * DK + column, x, mask=column < DK)
        column = tl.arange(0, WV)
        x = tl.load(v_ptr + slot * stride_vn + pair % HEADS * stride_vh + column, mask=column < DV)
        tl.store(values_ptr + to * DV + column, x, mask=column < DV)


def _options(k: Tensor, v: Tensor) -> dict[str, int]:
    dk, dv, overlap = k.shape[-1], v.shape[-1], can_overlap(k.device)
    dims = {"DK": dk, "WK": triton.next_power_of_2(dk), "DV": dv, "WV": triton.next_power_of_2(dv)}
    return {**dims, "OVERLAP": overlap, **overlap_options(overlap)}


def store_token(past: Tensor, selection: Stores, window: Stores, raw: Stores, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The token after past int32 [B] of every sequence into the caches, a window's over its oldest, raw's behind those kept.

    Returns what phi reads, [B * l, Hkv, D] of raw's keys and values before phi: from each sequence's first incomplete block
    on, the new token in all places behind the last. Of raw what the next token's block begins with is kept.
    """
    l = geometry.kernel_size
    B, heads, places, _ = selection.keys.shape
    joined = [x.new_empty(B * l, heads, x.shape[-1]) for x in (raw.k, raw.v)]
    news = [(x.k.contiguous(), x.v.contiguous(), x.keys, x.values) for x in (selection, window, raw)]
    _store_token[(B * heads,)](
        past, *news[0], *news[1], *news[2], *joined, places, HEADS=heads, WINDOW=geometry.window_size, L=l,
        STRIDE=geometry.kernel_stride, ROWS=triton.next_power_of_2(l), num_warps=4, **_options(raw.k, raw.v),
    )  # fmt: skip
    return joined[0], joined[1]


def store_block(past: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, geometry: Geometry) -> None:
    """The block that the token after past completes, if it does, from what phi made of store_token's result, k and v
    [B * l / d, Hkv, D], to its place in the caches [B, Hkv, places, D]."""
    B, heads, places, _ = keys.shape
    k, v = unit_stride(k), unit_stride(v)
    _store_block[(B * heads,)](
        past, k, v, keys, values, *k.stride()[:2], *v.stride()[:2], places, HEADS=heads, L=geometry.kernel_size,
        STRIDE=geometry.kernel_stride, num_warps=1, **_options(k, v),
    )  # fmt: skip
