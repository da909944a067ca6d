"""The top-n blocks of a few queries, from importances that lie in a program's own scratch memory: the device part."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _side(n: tl.constexpr, j: tl.constexpr):
    """0 and 1 along the j-th innermost of n axes."""
    return tl.reshape(tl.arange(0, 2), [1] * (n - j - 1) + [2] + [1] * j)


@triton.jit
def _exchange(x, n: tl.constexpr, j: tl.constexpr, down):
    """Put each pair along the j-th innermost axis in ascending order, in descending where `down`."""
    partner = tl.sum(x, n - 1 - j, keep_dims=True) - x  # exact, since integers wrap around
    return tl.where((_side(n, j) ^ down) == 1, tl.maximum(x, partner), tl.minimum(x, partner))


@triton.jit
def _merge(x, n: tl.constexpr, steps: tl.constexpr, down):
    """Sort bitonic runs of 2 ** steps elements along the innermost of x's n axes, each of 2; descending where `down`."""
    for i in tl.static_range(steps):
        x = _exchange(x, n, steps - 1 - i, down)
    return x


@triton.jit
def _halve(x, n: tl.constexpr, log_run: tl.constexpr, last: tl.constexpr):
    """Of each two sorted runs of 2 ** log_run, one ascending and one descending, keep the larger half, sorted again."""
    x = tl.max(x, n - 1 - log_run)
    return _merge(x, n - 1, log_run, 0 if last else _side(n - 1, log_run))


@triton.jit
def largest(x, TOKENS: tl.constexpr, LOG_CHUNK: tl.constexpr, LOG_WIDTH: tl.constexpr):
    """The 2 ** LOG_WIDTH largest of each row of x, int32 [TOKENS, 2 ** LOG_CHUNK], ascending."""
    x = tl.reshape(x, [TOKENS] + [2] * LOG_CHUNK)
    for i in tl.static_range(1, LOG_WIDTH + 1):
        x = _merge(x, LOG_CHUNK + 1, i, _side(LOG_CHUNK + 1, i) if i < LOG_CHUNK else 0)
    for i in tl.static_range(LOG_CHUNK - LOG_WIDTH):
        x = _halve(x, LOG_CHUNK + 1 - i, LOG_WIDTH, i == LOG_CHUNK - LOG_WIDTH - 1)
    return tl.reshape(x, [TOKENS, 2**LOG_WIDTH])


@triton.jit
def _ranks(
    own_ptr, next_ptr, block, current, seen, PER_BLOCK: tl.constexpr, CARRIES: tl.constexpr, INIT: tl.constexpr,
    LOCAL: tl.constexpr,
):  # fmt: skip
    """int32 [tokens, blocks] what blocks are chosen by: importance, the largest where forced, -1 in the query's future.

    Importances are not negative, so their bits order as they do. own holds a block's weighted slots, next what the block
    before counts for it. Neither was written where those slots are not seen: what lies there is read and dropped, since
    unmasked loads are wide ones.
    """
    rank = tl.where(block * PER_BLOCK < seen, tl.load(own_ptr + block), 0.0)
    if CARRIES:
        rank += tl.where((block > 0) & ((block - 1) * PER_BLOCK < seen), tl.load(next_ptr + block), 0.0)
    forced = (block < INIT) | (block > current - LOCAL)
    rank = tl.where(forced, 0x7FFFFFFF, rank.to(tl.int32, bitcast=True))
    return tl.where(block <= current, rank, -1)


@triton.jit
def pick_blocks(
    own_ptr, next_ptr, out_ptr, current, seen, token_ok,
    TOKENS: tl.constexpr, PER_BLOCK: tl.constexpr, CARRIES: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the TOPK blocks of largest rank, ties to the lower block, ascending, then -1.

    own_ptr, next_ptr, out_ptr [TOKENS]: each query's row, the first two of whole chunks. current [TOKENS]: the block it
    stands in. seen [TOKENS]: the slots it sees. CARRIES: whether blocks have a `next`. 2 ** LOG_WIDTH >= TOPK.

    The first sweep finds each query's n-th largest rank; the second takes what lies above it and, lowest first, as many
    of its equals as there is room for. What is written is thus in order already.
    """
    CHUNK: tl.constexpr = 2**LOG_CHUNK
    WIDTH: tl.constexpr = 2**LOG_WIDTH
    num_blocks = tl.max(current, 0) + 1
    chunk = tl.arange(0, CHUNK)
    current = current[:, None]
    seen = seen[:, None]
    own_ptr = own_ptr[:, None]
    next_ptr = next_ptr[:, None]

    best = tl.full([TOKENS, WIDTH], -1, tl.int32)
    for first in tl.range(0, num_blocks, CHUNK, num_stages=1):
        rank = _ranks(own_ptr, next_ptr, (first + chunk)[None, :], current, seen, PER_BLOCK, CARRIES, INIT, LOCAL)
        best = tl.maximum(best, largest(rank, TOKENS, LOG_CHUNK, LOG_WIDTH))
        best = tl.reshape(_merge(tl.reshape(best, [TOKENS] + [2] * LOG_WIDTH), LOG_WIDTH + 1, LOG_WIDTH, 1), [TOKENS, WIDTH])
    place = tl.arange(0, WIDTH)[None, :]
    last = tl.max(tl.where(place == TOPK - 1, best, -1), 1)[:, None]
    above = tl.sum(((place < TOPK) & (best > last)).to(tl.int32), 1)[:, None]
    room = TOPK - above

    # Counts so far, packed: those above in the low half, equals in the high half.
    before = tl.zeros([TOKENS, 1], tl.int32)
    for first in tl.range(0, num_blocks, CHUNK, num_stages=1):
        block = (first + chunk)[None, :]
        rank = _ranks(own_ptr, next_ptr, block, current, seen, PER_BLOCK, CARRIES, INIT, LOCAL)
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
