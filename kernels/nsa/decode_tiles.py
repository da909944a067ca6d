"""How the decode launches of one layer are cut: tiles, numbers of parts, shares. Defaults live in `DecodeTiles.of`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sieve.kernels.common.launch import multiprocessors
from sieve.kernels.common.split_keys import Tile, decode_tile

MOST_SHARE = 256  # blocks that one program can compare with one another in registers
WEIGHED = 1024  # scores that one warp holds
# Registers of a program that weighs all heads of a group at once: three programs of eight warps fit on a multiprocessor.
WEIGH_REGISTERS = 80
# As training's tiles have, in the order of whose sums a choice is made anew.
SELECT_WARPS = 4


@dataclass(frozen=True)
class DecodeTiles:
    """first: of compression and window; select: of the selected blocks.

    programs, select_programs: about how many of those launches' run at once. share: blocks that one program weighs, a
    power of two up to MOST_SHARE; None: see `share_of`. overlap: launches begin before those ahead of them end; None: see
    `sieve.kernels.common.launch.overlaps`. margin: see `sieve.kernels.nsa.decode_ties.near`; some eighty times what
    rounding moved in a million choices; inf: every choice is made anew.
    """

    first: Tile
    select: Tile
    programs: int
    select_programs: int
    share: int | None
    overlap: bool | None
    margin: float = 2.0**-23

    def __post_init__(self) -> None:
        if self.select.num_warps != SELECT_WARPS:
            raise ValueError(
                f"select={self.select} must have {SELECT_WARPS} warps: others add sums in another order than training"
            )

    @classmethod
    def of(cls, group: int, d_qk: int, d_v: int, dtype: torch.dtype, device: torch.device) -> DecodeTiles:
        tile, programs = decode_tile(group, d_qk, d_v, dtype), multiprocessors(device)
        # Measured for 128/128 in bf16 on an H200 (`sieve bench decode --sweep`); three loads of half the size under way.
        halves = dtype != torch.float32 and d_qk + d_v == 256
        first = replace(tile, keys=tile.keys // 2, num_stages=4) if halves else tile
        return cls(first, replace(tile, num_warps=SELECT_WARPS), 2 * programs, programs, None, None)


def share_of(blocks: int, kept: int) -> int:
    """About sqrt(blocks * kept): as many blocks to compare in a share as there are then left of all shares."""
    return min(MOST_SHARE, max(16, 1 << ((blocks * kept).bit_length() - 1) // 2))


def heads_weighed(group: int, share: int, slots: int) -> int:
    """How many heads of a group a program weighs at once, a power of two, when each block of its share has `slots` scores."""
    padded = 1 << (group - 1).bit_length()
    return max(1, min(padded, weigh_warps(share) * WEIGHED // (share * slots)))


def weigh_warps(share: int) -> int:
    return 8 if share <= 128 else 16
