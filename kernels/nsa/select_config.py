"""Tile sizes of the selected branch's kernels: a pure function of shape and dtype, so that runs repeat bit for bit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A launch: `rows` (token, head of the group) pairs by `keys` keys at a time. Both powers of two, at least 16."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def tokens(self, group: int) -> int:
        """Whole tokens in a tile's rows; 64 is as many as a membership mask has bits."""
        return min(max(self.rows // group, 1), 64)


def key_tile(block_size: int, largest: int) -> int:
    """Keys of a step: a block, or an even part of it; a block size that is no power of two is rounded up and masked."""
    return min(max(1 << (block_size - 1).bit_length(), 16), largest)


def row_tile(group: int, rows: int) -> int:
    """Rows of a tile: `rows`, or as many as one token of a larger group needs."""
    return max(rows, 1 << (group - 1).bit_length())


def forward_tile(group: int, d_qk: int, d_v: int, block_size: int, itemsize: int) -> Tile:
    """group: query heads a KV head. itemsize: bytes of an element of q, k and v."""
    if itemsize == 4:
        return Tile(row_tile(group, 16), key_tile(block_size, 16), 8, 1)
    rows, keys = row_tile(group, 64), key_tile(block_size, 64)
    # Three stages keep loads a whole step ahead; above 256 dims they would leave shared memory for one tile alone.
    if d_qk + d_v <= 256:
        return Tile(rows, keys, 4, 3)
    return Tile(rows, keys, 4 if d_qk + d_v <= 384 else 8, 2)


def dq_tile(group: int, d_qk: int, d_v: int, block_size: int, itemsize: int) -> Tile:
    if itemsize == 4:
        return Tile(row_tile(group, 16), key_tile(block_size, 16), 8, 1)
    return Tile(row_tile(group, 64), key_tile(block_size, 64), 4 if d_qk + d_v <= 320 else 8, 2)


def dkv_tile(group: int, d_qk: int, d_v: int, block_size: int, itemsize: int) -> Tile:
    """Here the rows are gathered queries, and the keys are the rows of the dots."""
    if itemsize == 4:
        return Tile(row_tile(group, 16), key_tile(block_size, 16), 8, 1)
    keys = key_tile(block_size, 64)
    if d_qk + d_v <= 256:
        return Tile(row_tile(group, 64), keys, 4, 2)
    return Tile(row_tile(group, 64 if d_qk + d_v <= 320 else 32), keys, 8, 2)


def piece_length(entries: int) -> int:
    """Queries in a piece of a block's list: pieces for some sixteen rounds of 132 multiprocessors, 256 to 1024 long.

    Longer pieces leave fewer partial sums to add, shorter ones fill the device better where there is little to do.
    """
    return min(max(1 << (entries // 2048).bit_length(), 256), 1024)
