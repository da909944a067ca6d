"""The queries of each selection block, from the blocks of each query: what dk and dv are summed over.

A stable sort by block keeps the queries of a block in ascending order, so that sums over them repeat bit for bit. It
sorts by segments of the queries first, since whoever gathers a segment's queries finds them in the L2 cache. Lists have
any length (every query may want its document's first block), so they are cut into pieces of bounded length, whose
number is bounded by sizes known on the host: nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.nsa.layout import Packing

NARROW = 2**16  # lists that an int16 can name: a radix sort takes half as many passes over it as over an int32


@dataclass(frozen=True)
class InverseIndex:
    """Lists of queries, for each segment of the queries the list h * blocks + j of (KV head h, block j).

    Document b's block i is j = cu_seqlens[b] // l' + b + i. A document of L tokens has at most L // l' + 1 blocks of l'
    tokens, so those of different documents never collide, and blocks = T // l' + N numbers suffice, some of them unused.

    token: int32 [T * Hkv * topk]. With i counting the lists of all segments, token[offset[i] : offset[i + 1]] are the
        segment's tokens that chose the list's block, ascending.
    entry: int32, where in `indices` [T, Hkv, topk], flattened, the token chose the block.
    list: int32, i beside each token; the number of lists of all segments where `token` is unused, past the last offset.
    offset: int32 [segments * lists + 1], lists = Hkv * blocks.
    start, end: int32 [blocks], packed indices of a block's first token and past its last; start >= end where unused.

    Lists are cut into pieces of at most `length` tokens; where invert's `least` is 1, empty lists have a piece too:
    pieces: int32 [2, segments, lists], the number of pieces of a segment up to and with a list's: of all lists, and of
        those that have several pieces.
    owner: int32 [segments, bound of a segment's pieces], the list of each piece, `lists` where unused.
    rows: bound of pieces[1].
    """

    token: Tensor
    entry: Tensor
    list: Tensor
    offset: Tensor
    start: Tensor
    end: Tensor
    pieces: Tensor
    owner: Tensor
    rows: int
    length: int

    @property
    def blocks(self) -> int:
        return self.start.numel()

    @property
    def segments(self) -> int:
        return self.pieces.shape[1]

    @property
    def lists(self) -> int:
        return self.pieces.shape[2]


@triton.jit
def _count_below(ptr, x, size, STEPS: tl.constexpr):
    """How many of the ascending ptr[:size] are below x; 2 ** STEPS > size."""
    low = tl.zeros_like(x)
    high = low + size
    for _ in range(STEPS):
        middle = (low + high) // 2
        inside = low < high
        below = inside & (tl.load(ptr + middle, mask=inside, other=0) < x)
        low = tl.where(below, middle + 1, low)
        high = tl.where(inside & ~below, middle, high)
    return low


@triton.jit(do_not_specialize=["entries", "blocks", "none"])
def _name_lists(
    indices_ptr, cu_ptr, doc_ptr, position_ptr, name_ptr, entries, blocks, segment, none,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, TOPK: tl.constexpr, LOWEST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The list of each entry, counted from LOWEST; one that names no block, repeats the one before or sees nothing goes
    past the last."""
    entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    ok = entry < entries
    token = entry // (KV_HEADS * TOPK)
    block = tl.load(indices_ptr + entry, mask=ok, other=-1)
    before = tl.load(indices_ptr + entry - 1, mask=ok & (entry % TOPK > 0), other=-1)
    position = tl.load(position_ptr + token, mask=ok, other=0)
    doc = tl.load(doc_ptr + token, mask=ok, other=0)
    base = tl.load(cu_ptr + doc, mask=ok, other=0) // BLOCK + doc
    head = ((entry // TOPK) % KV_HEADS).to(tl.int32)
    counts = (block >= 0) & (block != before) & (block * BLOCK <= position)
    number = ((token // segment).to(tl.int32) * KV_HEADS + head) * blocks + base + block
    tl.store(name_ptr + entry, (tl.where(counts, number, none) + LOWEST).to(name_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["entries", "blocks", "lists", "documents", "least"])
def _measure(
    name_ptr, order_ptr, cu_ptr, token_ptr, entry_ptr, list_ptr, offset_ptr, start_ptr, end_ptr, pieces_ptr,
    entries, blocks, lists, documents, length, least,
    BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, LOWEST: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
    DOC_STEPS: tl.constexpr,
):  # fmt: skip
    """Fill token, entry and list by entry, offset and pieces (not yet summed up) by list, start and end by block."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    entry = tl.load(order_ptr + at, mask=at < entries, other=0).to(tl.int32)
    tl.store(entry_ptr + at, entry, mask=at < entries)
    tl.store(token_ptr + at, entry // PER_TOKEN, mask=at < entries)
    name = tl.load(name_ptr + at, mask=at < entries, other=0).to(tl.int32)
    tl.store(list_ptr + at, name - LOWEST, mask=at < entries)
    if tl.program_id(0) * SIZE <= lists:
        offset = _count_below(name_ptr, at + LOWEST, entries, STEPS)
        count = tl.maximum(tl.cdiv(_count_below(name_ptr, at + (1 + LOWEST), entries, STEPS) - offset, length), least)
        tl.store(offset_ptr + at, offset, mask=at <= lists)
        tl.store(pieces_ptr + at, count, mask=at < lists)
        tl.store(pieces_ptr + lists + at, tl.where(count > 1, count, 0), mask=at < lists)
    if tl.program_id(0) * SIZE < blocks:
        # The last document whose block 0 is not past `at`: their numbers ascend strictly.
        low = tl.zeros_like(at)
        high = low + documents
        for _ in range(DOC_STEPS):
            middle = (low + high) // 2
            inside = high - low > 1
            past = tl.load(cu_ptr + middle, mask=inside, other=0) // BLOCK + middle > at
            high = tl.where(inside & past, middle, high)
            low = tl.where(inside & ~past, middle, low)
        first = tl.load(cu_ptr + low)
        start = first + (at - first // BLOCK - low) * BLOCK
        tl.store(start_ptr + at, start, mask=at < blocks)
        tl.store(end_ptr + at, tl.minimum(start + BLOCK, tl.load(cu_ptr + low + 1)), mask=at < blocks)


@triton.jit(do_not_specialize=["lists", "size"])
def _own(pieces_ptr, owner_ptr, lists, size, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """The list of each piece of segment program_id(1)."""
    piece = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    owner = _count_below(pieces_ptr + tl.program_id(1) * lists, piece + 1, lists, STEPS)
    tl.store(owner_ptr + tl.program_id(1).to(tl.int64) * size + piece, owner, mask=piece < size)


def invert(
    indices: Tensor, packing: Packing, block_size: int, segment: int, length: int, *, least: int = 0, first_token: int = 0
) -> InverseIndex:
    """indices int32 [n, Hkv, topk] (document-local block numbers, -1 = none) -> the queries of each (KV head, block).

    The queries are the packed tokens [first_token, first_token + n), numbered from 0; packing.doc and .position are
    theirs. Segments are `segment` queries, pieces `length`. Needs n >= 1. Raises ValueError from 2^31 entries on.
    """
    (tokens, kv_heads, topk), entries, device = indices.shape, indices.numel(), indices.device
    if entries >= 2**31:
        raise ValueError(f"T * Hkv * topk = {list(indices.shape)} must stay below 2^31; split the row, or lower topk")
    documents = packing.num_documents
    blocks = (first_token + tokens) // block_size + documents
    segments, lists = triton.cdiv(tokens, segment), kv_heads * blocks

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    lowest = -(2**15) if segments * lists < NARROW else 0
    names, size = torch.empty(entries, dtype=torch.int16 if lowest else torch.int32, device=device), 1024
    _name_lists[(triton.cdiv(entries, size),)](
        indices.contiguous(), packing.cu_seqlens, packing.doc, packing.position, names, entries, blocks,
        segment, segments * lists, BLOCK=block_size, KV_HEADS=kv_heads, TOPK=topk, LOWEST=lowest, SIZE=size,
    )  # fmt: skip
    names, order = torch.sort(names, stable=True)
    token, entry, number = empty(entries), empty(entries), empty(entries)
    offset, pieces, start, end = empty(segments * lists + 1), empty(2, segments, lists), empty(blocks), empty(blocks)
    _measure[(triton.cdiv(max(entries, segments * lists + 1), size),)](
        names, order, packing.cu_seqlens, token, entry, number, offset, start, end, pieces,
        entries, blocks, segments * lists, documents, length, least,
        BLOCK=block_size, PER_TOKEN=kv_heads * topk, LOWEST=lowest, SIZE=size,
        STEPS=entries.bit_length(), DOC_STEPS=documents.bit_length(),
    )  # fmt: skip
    pieces = pieces.cumsum(2, dtype=torch.int32)
    # A list of n tokens has at most n / length + 1 pieces, and at most 2n / length if it has several.
    most = min(segment, tokens) * kv_heads * topk
    owner = empty(segments, lists + most // length)
    _own[(triton.cdiv(owner.shape[1], size), segments)](
        pieces, owner, lists, owner.shape[1], STEPS=lists.bit_length(), SIZE=size
    )
    return InverseIndex(token, entry, number, offset, start, end, pieces, owner, 2 * most // length, length)
