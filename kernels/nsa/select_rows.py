"""What the kernels of the selected branch share: rows of queries, tiles of keys, pieces of the lists of queries."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sieve.kernels.common.dims import split_dim

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_rows(num_tokens, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """The tile's rows, token by token: (slot of the token in the tile, token, query head, row_ok)."""
    row = tl.arange(0, ROWS)
    slot = row // GROUP
    token = tl.program_id(0) * TOKENS + slot
    return slot, token, tl.program_id(1) * GROUP + row % GROUP, (slot < TOKENS) & (token < num_tokens)


@triton.jit
def load_rows(ptr, offset, row_ok, FROM: tl.constexpr, D: tl.constexpr):
    """Columns [FROM, FROM + D) of the rows that begin at ptr + offset, 0 where not row_ok."""
    return tl.load(ptr + offset[:, None] + (FROM + tl.arange(0, D))[None, :], mask=row_ok[:, None], other=0.0)


@triton.jit
def store_rows(ptr, offset, x, row_ok, FROM: tl.constexpr, D: tl.constexpr):
    at = ptr + offset[:, None] + (FROM + tl.arange(0, D))[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def last_key(first, start, bits, slot, token, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The last key each row sees of KEYS ones, from `first` on, of the block that begins at `start`; below 0: none."""
    limit = token
    if BLOCK % KEYS != 0:
        limit = tl.minimum(token, start + (BLOCK - 1))
    return tl.where(((bits >> slot) & 1) != 0, limit - first, -1)


@triton.jit
def list_piece(number, nth_piece, offset_ptr, pieces_ptr, length):
    """Piece `nth_piece` of a segment's pieces, of list `number`: (begin, end) in the index's tokens, its place in the list."""
    begin = tl.load(offset_ptr + number)
    end = tl.load(offset_ptr + number + 1)
    nth = nth_piece - (tl.load(pieces_ptr + number) - tl.maximum(tl.cdiv(end - begin, length), 1))
    begin += nth * length
    return begin, tl.minimum(begin + length, end), nth


@triton.jit
def own_queries_end(token_ptr, begin, end, first_token, key_end, BLOCK_UP: tl.constexpr):
    """Past the queries of a piece that stand before key_end, the end of (a part of) their block: at most a block of them,
    since they are the block's own tokens, and first in the list."""
    ahead = begin + tl.arange(0, BLOCK_UP)
    own = tl.load(token_ptr + ahead, mask=ahead < end, other=2147483647) < key_end - first_token
    return begin + tl.sum(own.to(tl.int32), 0)


def flat_heads(x: Tensor) -> Tensor:
    """x [T, Hkv, D] as [T, Hkv * D] with 16-byte aligned rows, as a tensor descriptor takes it; copies if it must."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if not (x.stride(2) == 1 and x.stride(1) == x.shape[2] and aligned):
        x = x.contiguous()
    return x.flatten(1)


def key_descriptors(x: Tensor, keys: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of tiles of `keys` tokens of one head of x [T, Hkv, D], for the two parts of split_dim(D).

    Where there is no second part, its place is taken by the first, which the kernel then does not touch.
    """
    d0, d1 = split_dim(x.shape[2])
    flat = flat_heads(x)
    return tuple(TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [keys, d]) for d in (d0, d1 or d0))


def check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive: the maximum is taken before scaling; use d_qk ** -0.5")
