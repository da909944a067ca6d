"""Sliding-window attention: which rows and keys a tile holds, and how large tiles are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """A launch: block_m (token, head) rows by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


def forward_tile(d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if d_v > 192:  # 128 rows of the accumulator would spill
        return Tile(64, 64, 8, 2)
    if d_qk + d_v <= 256:
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3 if d_qk + d_v <= 320 else 2)


def dq_tile(d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64, 4, 2) if d_qk + d_v <= 256 else Tile(64, 32, 4, 3)


def dkv_tile(d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    """Two accumulators of block_n keys. A few registers spill, which was measured to cost less than smaller tiles."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if d_qk + d_v <= 256:
        return Tile(64, 64, 4, 2)
    if d_qk + d_v <= 320:
        return Tile(64, 128, 8, 3)
    return Tile(64 if d_qk + d_v <= 384 else 32, 64, 8, 2)


@triton.jit
def row_tile(
    position_ptr, num_tokens, token_offset, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (token, head of KV group program_id(1)) and the run of keys they see.

    Row of token t sees the keys [t - min(position, window - 1), t]. Neither end falls along the rows, so the tile's
    keys are one run of `blocks` blocks from `begin` on; every row sees [whole, whole_end) of them whole: no mask there.
    Rows past the end repeat the last token: row_ok is False there.
    Returns per row: local (index in q, int64), head, token (index among the keys), start, row_ok; then the run.
    """
    # A wide window makes late tiles the longest: start them first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    local = (row // GROUP).to(tl.int32)
    head = tl.program_id(1) * GROUP + (row % GROUP).to(tl.int32)
    row_ok = local < num_tokens
    local = tl.minimum(local, num_tokens - 1)
    token = token_offset + local
    start = token - tl.minimum(tl.load(position_ptr + local), window - 1)

    first_local = (first_row // GROUP).to(tl.int32)
    last_local = tl.minimum(((first_row + BLOCK_M - 1) // GROUP).to(tl.int32), num_tokens - 1)
    first_token = token_offset + first_local
    last_token = token_offset + last_local
    begin = first_token - tl.minimum(tl.load(position_ptr + first_local), window - 1)
    last_start = last_token - tl.minimum(tl.load(position_ptr + last_local), window - 1)
    blocks = tl.cdiv(last_token + 1 - begin, BLOCK_N)
    whole = tl.cdiv(last_start - begin, BLOCK_N)
    whole_end = (first_token + 1 - begin) // BLOCK_N
    return local.to(tl.int64), head, token, start, row_ok, begin, blocks, whole, whole_end
