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
    if d_qk + d_v <= 256:
        return Tile(row_tile(group, 64), key_tile(block_size, 64), 4, 2)
    # Two accumulators of dq's columns leave registers for half the keys.
    return Tile(row_tile(group, 64), key_tile(block_size, 32), 4 if d_qk + d_v <= 320 else 8, 3 if d_qk + d_v <= 320 else 2)


def dkv_tile(group: int, d_qk: int, d_v: int, block_size: int, itemsize: int) -> Tile:
    """Here the rows are gathered queries, and the keys are the rows of the dots."""
    if itemsize == 4:
        return Tile(row_tile(group, 16), key_tile(block_size, 16), 8, 1)
    keys = key_tile(block_size, 64)
    if d_qk + d_v <= 256:
        return Tile(row_tile(group, 64), keys, 4, 2)
    return Tile(row_tile(group, 32), keys, 4, 3) if d_qk + d_v <= 320 else Tile(row_tile(group, 32), keys, 8, 2)


def piece_length(entries: int) -> int:
    """Queries in a piece of a block's list: pieces for some eight rounds of 264 programs, 256 to 2048 long.

    entries: of all lists. Longer pieces leave fewer partial sums to add, shorter ones fill the device better where there
    is little to do.
    """
    return min(max(1 << (entries // 2048).bit_length(), 256), 2048)


def by_list(group: int, d_qk: int, d_v: int, block_size: int, itemsize: int) -> bool:
    """Whether forward and dq go by lists (select_gather) rather than by unions (select_union) of blocks.

    By lists each (query, block) costs a partial result, whatever the selection; by unions a tile of 64 rows pays for all
    blocks that any of its 64 / group tokens chose: fewer than those of one token each, but more than one token's. At four
    heads the two are about equal where neighbours choose alike, and lists several times faster where they do not.
    """
    fits = (d_qk + d_v) * max(block_size, 64) * itemsize <= 65536  # a block's keys and values stay in shared memory
    return group <= 4 and itemsize == 2 and fits


def gather_tile(group: int, d_qk: int, d_v: int, backward: bool) -> Tile:
    """Of select_gather's launches; `keys` is not used: a step takes a whole block."""
    return Tile(row_tile(group, 64), 64, 4, 2 if backward or d_qk + d_v > 256 else 3)


def gather_length(group: int) -> int:
    """Queries in a piece of a list of select_gather: 16 steps of 64 rows, to which loading the block is little."""
    return max(1024 // group, 16)


def partial_segment(token_bytes: int) -> int:
    """Queries whose partial results, token_bytes each, are held at once: 512 MB, but no fewer than fill the device."""
    return max(1 << ((512 << 20) // token_bytes).bit_length() - 1, 512)
