"""The top-n blocks of a few queries, from importances that lie in a program's own scratch memory: the device part."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ranks(own_ptr, next_ptr, block, current, seen, PER_BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr):
    """[tokens, blocks] what blocks are chosen by: their importance, +inf where forced, -1 where in the query's future.

    own holds a block's weighted slots, next what the block before counts for it. Neither was written where those slots
    are not seen: what lies there is read and dropped, since unmasked loads are wide ones.
    """
    own = tl.where(block * PER_BLOCK < seen, tl.load(own_ptr + block), 0.0)
    carried = tl.where((block > 0) & ((block - 1) * PER_BLOCK < seen), tl.load(next_ptr + block), 0.0)
    forced = (block < INIT) | (block > current - LOCAL)
    return tl.where(block <= current, tl.where(forced, float("inf"), own + carried), -1.0)


@triton.jit
def pick_blocks(
    own_ptr, next_ptr, out_ptr, current, seen, token_ok, num_blocks,
    TOKENS: tl.constexpr, PER_BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the TOPK blocks of largest rank, ties to the lower block, ascending, then -1.

    own_ptr, next_ptr, out_ptr [TOKENS]: each query's row, the first two of whole CHUNKs. current [TOKENS]: the block it
    stands in. seen [TOKENS]: the slots it sees. num_blocks: more than any `current`. WIDTH: TOPK rounded up to a power of two.

    The first sweep finds each query's n-th largest rank; the second takes what lies above it and, lowest first, as many
    of its equals as there is room for. What is written is thus in order already.
    """
    chunk = tl.arange(0, CHUNK)
    current = current[:, None]
    seen = seen[:, None]
    own_ptr = own_ptr[:, None]
    next_ptr = next_ptr[:, None]

    best = tl.full([TOKENS, WIDTH], -1.0, tl.float32)
    for first in tl.range(0, num_blocks, CHUNK, num_stages=1):
        rank = _ranks(own_ptr, next_ptr, (first + chunk)[None, :], current, seen, PER_BLOCK, INIT, LOCAL)
        # Two descending runs, one reversed, have their WIDTH largest in the places' maxima.
        best = tl.maximum(best, tl.flip(tl.topk(rank, WIDTH), 1))
        best = tl.bitonic_merge(best, descending=True)
    place = tl.arange(0, WIDTH)[None, :]
    last = tl.max(tl.where(place == TOPK - 1, best, -1.0), 1)[:, None]
    above = tl.sum(((place < TOPK) & (best > last)).to(tl.int32), 1)[:, None]
    room = TOPK - above

    # Counts so far, packed: those above in the low half, equals in the high half.
    before = tl.zeros([TOKENS, 1], tl.int32)
    for first in tl.range(0, num_blocks, CHUNK, num_stages=1):
        block = (first + chunk)[None, :]
        rank = _ranks(own_ptr, next_ptr, block, current, seen, PER_BLOCK, INIT, LOCAL)
        higher = rank > last
        equal = (rank == last) & (block <= current)
        count = higher.to(tl.int32) + (equal.to(tl.int32) << 16)
        ahead = before + tl.cumsum(count, 1) - count
        equals = ahead >> 16
        at = (ahead & 0xFFFF) + tl.minimum(equals, room)
        taken = token_ok[:, None] & (higher | (equal & (equals < room))) & (at < TOPK)
        tl.store(out_ptr[:, None] + at, block + tl.zeros([TOKENS, 1], tl.int32), mask=taken)
        before += tl.sum(count, 1)[:, None]
    found = (before & 0xFFFF) + tl.minimum(before >> 16, room)
    rest = token_ok[:, None] & (place < TOPK) & (place >= found)
    tl.store(out_ptr[:, None] + place, tl.full([TOKENS, WIDTH], -1, tl.int32), mask=rest)
