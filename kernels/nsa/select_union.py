"""Which selection blocks a tile of neighbouring tokens reads: the union of their indices, each block once.

Loading every query's blocks anew is bound by the L2 cache. Neighbouring queries choose much the same blocks, so a tile
of them loads each block of the union once and hides it from the rows that did not choose it: exact for any indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.nsa.layout import Packing

MAX_TOKENS = 64  # bits of a membership mask


@dataclass(frozen=True)
class BlockUnion:
    """The blocks of each tile of `tokens` consecutive packed tokens, by KV head; documents may meet within a tile.

    start: int32 [Hkv, tiles, tokens * topk], packed index of a block's first token, ascending; only the first `count`
        of a tile are written.
    members: int32 or int64 (over 31 tokens), beside `start`: bit s is set when the tile's s-th token chose the block.
    count: int32 [Hkv, tiles].
    """

    start: Tensor
    members: Tensor
    count: Tensor
    tokens: int

    @property
    def tiles(self) -> int:
        return self.count.shape[1]

    @property
    def capacity(self) -> int:
        return self.start.shape[2]


@triton.jit
def _entries(
    entry, indices_ptr, position_ptr, tile_token, num_tokens, first_token,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """Of each entry of the tile: its block's first token (packed), its slot in the tile, whether it counts.

    An entry equal to the one before it is dropped: a block chosen twice must not carry into the next token's bit. So is
    a block that begins after its query, of which the query would see nothing.
    """
    slot = entry // TOPK
    column = entry - slot * TOPK
    token = tile_token + slot
    ok = (slot < TOKENS) & (token < num_tokens)
    at = indices_ptr + slot * (tl.num_programs(1) * TOPK) + column
    block = tl.load(at, mask=ok, other=-1)
    before = tl.load(at - 1, mask=ok & (column > 0), other=-1)
    position = tl.load(position_ptr + token, mask=ok, other=0)
    begin = block * BLOCK
    return first_token + token - position + begin, slot, ok & (block >= 0) & (block != before) & (begin <= position)


@triton.jit(do_not_specialize=["num_tokens", "first_token"])
def _unite(
    indices_ptr, position_ptr, start_ptr, members_ptr, count_ptr, num_tokens, first_token,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, TOPK: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile and KV head: rank each distinct block by counting the smaller ones, without a sort."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    tile_token = tile * TOKENS
    indices_ptr += (tile_token.to(tl.int64) * tl.num_programs(1) + kv_head) * TOPK
    row = kv_head.to(tl.int64) * tl.num_programs(0) + tile
    start_ptr += row * (TOKENS * TOPK)
    members_ptr += row * (TOKENS * TOPK)
    NONE: tl.constexpr = 0x7FFFFFFF
    entry = tl.arange(0, ENTRIES)
    start, slot, ok = _entries(
        entry, indices_ptr, position_ptr, tile_token, num_tokens, first_token, BLOCK, TOKENS, TOPK
    )
    start = tl.where(ok, start, NONE)
    bit = tl.full([ENTRIES], 1, members_ptr.dtype.element_ty) << slot.to(members_ptr.dtype.element_ty)
    members = tl.zeros([ENTRIES], members_ptr.dtype.element_ty)
    for c in range(0, ENTRIES, CHUNK):
        o_start, o_bit = start, bit
        if CHUNK < ENTRIES:
            o_start, o_slot, o_ok = _entries(
                c + tl.arange(0, CHUNK), indices_ptr, position_ptr, tile_token, num_tokens, first_token, BLOCK, TOKENS, TOPK
            )
            o_start = tl.where(o_ok, o_start, NONE)
            o_bit = tl.full([CHUNK], 1, members.dtype) << o_slot.to(members.dtype)
        members += tl.sum(tl.where(start[:, None] == o_start[None, :], o_bit[None, :], 0), 1)
    # A block counts where the tile's first token that chose it names it: a token names a block once.
    first = ok & ((members & (bit - 1)) == 0)
    counted = tl.where(first, start, NONE)
    rank = tl.zeros([ENTRIES], tl.int32)
    if CHUNK < ENTRIES:  # chunks of `counted` come by way of memory, which the ranked blocks overwrite
        tl.store(start_ptr + entry, counted, mask=entry < TOKENS * TOPK)
        tl.debug_barrier()
    for c in range(0, ENTRIES, CHUNK):
        other = counted
        if CHUNK < ENTRIES:
            at = c + tl.arange(0, CHUNK)
            other = tl.load(start_ptr + at, mask=at < TOKENS * TOPK, other=NONE)
        rank += tl.sum((other[None, :] < start[:, None]).to(tl.int32), 1)
    if CHUNK < ENTRIES:
        tl.debug_barrier()
    tl.store(count_ptr + row, tl.sum(first.to(tl.int32), 0))
    tl.store(start_ptr + rank, start, mask=first)
    tl.store(members_ptr + rank, members, mask=first)


def unite_blocks(
    indices: Tensor, packing: Packing, block_size: int, tokens: int, first_token: int = 0
) -> BlockUnion:
    """indices int32 [n, Hkv, topk] (document-local block numbers, -1 = none) -> the union over each `tokens` queries.

    The n queries are the packed tokens from first_token on, and packing.position is theirs.
    Raises ValueError when `tokens` is not in 1..64.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens={tokens} must be in 1..{MAX_TOKENS}, the bits of a mask")
    indices = indices.contiguous()
    num_tokens, kv_heads, topk = indices.shape
    tiles = triton.cdiv(num_tokens, tokens)
    shape, device = (kv_heads, tiles, tokens * topk), indices.device
    start = torch.empty(shape, dtype=torch.int32, device=device)
    members = torch.empty(shape, dtype=torch.int32 if tokens < 32 else torch.int64, device=device)
    count = torch.empty(shape[:2], dtype=torch.int32, device=device)
    if num_tokens:
        entries = triton.next_power_of_2(tokens * topk)
        _unite[(tiles, kv_heads)](
            indices, packing.position, start, members, count, num_tokens, first_token,
            BLOCK=block_size, TOKENS=tokens, TOPK=topk, ENTRIES=entries,
            CHUNK=max(1, min(entries, 4096 // entries)), num_warps=1 if entries <= 32 else 4,
        )  # fmt: skip
    return BlockUnion(start, members, count, tokens)
