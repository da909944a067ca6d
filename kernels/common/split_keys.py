"""Attention of one query over keys that are split among programs: tiles, the running softmax, parts and their merge.

With one query a sequence there are too few (sequence, KV head) pairs to fill a GPU, so each pair's keys are cut into parts
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). How many parts there are follows from shapes alone;
which keys a part takes, from the sequence's own length, so that a grid for the longest sequence wastes nothing on a
short one. Parts are added in their order, so results do not differ from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_PARTS = 63  # and one more result where two branches meet in a part


@dataclass(frozen=True)
class Tile:
    """A launch: the `rows` query heads of a group (padded to a power of two, at least 16) by `keys` at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def decode_tile(group: int, d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    """Small tiles with several loads under way: what counts is how many bytes are asked for at once."""
    rows = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tile(rows, 32, 4, 1) if d_qk + d_v <= 256 else Tile(rows, 16, 8, 1)
    return Tile(rows, 64, 4, 3) if d_qk + d_v <= 256 else Tile(rows, 32, 4, 3)


def parts_of(pairs: int, tiles: int, programs: int) -> int:
    """Into how many parts the keys of each of `pairs` are cut, for about `programs` programs of at most `tiles` tiles."""
    return max(1, min(programs // max(pairs, 1), tiles, MOST_PARTS))


def heads_together(parts: int, most: int = 32) -> int:
    """How many heads a program merges, a power of two, when each has `parts`: up to `most` rows of values."""
    return max(1, most // triton.next_power_of_2(parts))


@triton.jit
def pair_of(pair, HEADS_KV: tl.constexpr):
    """(sequence, KV head) of a pair, int64 both."""
    return (pair // HEADS_KV).to(tl.int64), (pair % HEADS_KV).to(tl.int64)


@triton.jit
def heads_of(program, heads, HEADS: tl.constexpr):
    """int [HEADS], the program's heads of `heads`; past the last it repeats that one, where ok is False."""
    head = program * HEADS + tl.arange(0, HEADS)
    return tl.minimum(head, heads - 1), head < heads


@triton.jit
def part_range(total, part, PARTS: tl.constexpr, KEYS: tl.constexpr):
    """[begin, end) of the keys [0, total) that part `part` takes: whole tiles, as evenly as they go."""
    tiles = tl.cdiv(total, KEYS)
    return tiles * part // PARTS * KEYS, tl.minimum(tiles * (part + 1) // PARTS * KEYS, total)


@triton.jit
def load_query(q_ptr, first_head, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr):
    """The group's query heads of contiguous q [B * H, D0 + D1], in two parts; rows past the group repeat its last head."""
    row = tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    at = q_ptr + ((first_head + row).to(tl.int64) * (D0 + D1))[:, None]
    q0 = tl.load(at + tl.arange(0, D0)[None, :])
    q1 = q0
    if D1 > 0:
        q1 = tl.load(at + D0 + tl.arange(0, D1)[None, :])
    return q0, q1


@triton.jit
def empty_sum(ROWS: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """The running softmax over no key: two parts of the weighted values, the largest score, the sum of weights."""
    acc0 = tl.zeros([ROWS, E0], tl.float32)
    acc1 = tl.zeros([ROWS, E1 if E1 > 0 else 1], tl.float32)
    return acc0, acc1, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def fold(
    acc0, acc1, top, total, q0, q1, k_at, v_at, visible, factor,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running softmax: pointers k_at, v_at [KEYS] to the rows of those `visible`.

    Also returns the scores in powers of two [ROWS, KEYS], -inf where not visible. What is not visible is not read.
    """
    mask = visible[:, None]
    k0 = tl.load(k_at[:, None] + tl.arange(0, D0)[None, :], mask=mask, other=0.0)
    s = tl.dot(q0, k0.T, input_precision="ieee")
    if D1 > 0:
        k1 = tl.load(k_at[:, None] + D0 + tl.arange(0, D1)[None, :], mask=mask, other=0.0)
        s = tl.dot(q1, k1.T, s, input_precision="ieee")
    s = tl.where(visible[None, :], s * factor, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    # With no key so far any finite number here keeps the weights at 0 instead of NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    v0 = tl.load(v_at[:, None] + tl.arange(0, E0)[None, :], mask=mask, other=0.0)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
    if E1 > 0:
        v1 = tl.load(v_at[:, None] + E0 + tl.arange(0, E1)[None, :], mask=mask, other=0.0)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, higher, total, s


@triton.jit
def store_part(
    o_ptr, stat_ptr, first_head, part, parts, acc0, acc1, top, total,
    GROUP: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Part `part` of `parts`: sums of weighted values fp32 [B * H, parts, E0 + E1], (largest score, sum) [B * H, parts, 2]."""
    row = tl.arange(0, ROWS)
    ok = row < GROUP
    at = (first_head + row).to(tl.int64) * parts + part
    tl.store(stat_ptr + 2 * at, top, mask=ok)
    tl.store(stat_ptr + 2 * at + 1, total, mask=ok)
    o_at = o_ptr + (at * (E0 + E1))[:, None]
    tl.store(o_at + tl.arange(0, E0)[None, :], acc0, mask=ok[:, None])
    if E1 > 0:
        tl.store(o_at + E0 + tl.arange(0, E1)[None, :], acc1, mask=ok[:, None])


@triton.jit
def merged(o_ptr, stat_ptr, head, COUNT: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Attention outputs [HEADS, WIDE] of int [HEADS] `head` from their COUNT parts; 0 if none saw a key."""
    part = tl.arange(0, PADDED)[None, :]
    column = tl.arange(0, WIDE)[None, None, :]
    real = part < COUNT
    at = head.to(tl.int64)[:, None] * COUNT + part
    top = tl.load(stat_ptr + 2 * at, mask=real, other=float("-inf"))
    total = tl.load(stat_ptr + 2 * at + 1, mask=real, other=0.0)
    # A part that saw nothing holds zeros, so that no load waits for another.
    o = tl.load(o_ptr + (at * DIM)[:, :, None] + column, mask=real[:, :, None] & (column < DIM), other=0.0)
    highest = tl.max(top, 1)
    scale = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    weight = tl.sum(total * scale, 1)
    return tl.sum(o * scale[:, :, None], 1) / tl.where(weight > 0.0, weight, 1.0)[:, None]
