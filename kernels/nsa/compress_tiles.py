"""Compression attention: how large tiles are, and which slots a tile of rows sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sieve.kernels.common.dims import split_dim


@dataclass(frozen=True)
class Tile:
    """A launch: `rows` (token, head of the group) pairs by `slots` compressed blocks at a time, both powers of two."""

    rows: int
    slots: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


def _rows(group: int, rows: int) -> int:
    """Rows of a tile: `rows`, or as many as one token of a larger group needs."""
    return max(rows, triton.next_power_of_2(group))


def forward_tile(group: int, d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(_rows(group, 32), 32, 4, 1)
    if d_qk + d_v <= 256:
        return Tile(_rows(group, 64), 64, 4, 3)
    return Tile(128, 32, 8, 2) if d_qk + d_v > 384 else Tile(128, 64, 8, 3)


def dq_tile(group: int, d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(_rows(group, 32), 32, 4, 1)
    if d_qk + d_v > 384:
        return Tile(_rows(group, 64), 32, 4, 2)
    return Tile(_rows(group, 64), 64, 4, 2) if d_qk + d_v <= 256 else Tile(128, 64, 8, 3)


def dkv_tile(d_qk: int, d_v: int, dtype: torch.dtype) -> Tile:
    """Rows are rounded up to a token of a larger group by the launcher."""
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1)
    return Tile(32, 64, 8, 2) if d_qk + d_v > 320 else Tile(64, 128, 8, 3)


def dkv_splits(programs: int) -> int:
    """Into how many runs of queries each of `programs` tiles of slots is cut, so that every multiprocessor has several.

    Partial sums then take at most programs * splits tiles: 0.13 GB of fp32 at 128 slots by 128 + 128 dims, or, where
    one run is enough, the size of k and v in fp32.
    """
    return max(1, min(32, 1024 // programs))


def copyable(x: Tensor) -> Tensor:
    """x, or a copy where the copy engine cannot read it: base and strides in multiples of 16 bytes, the last of 1."""
    steps = [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])]
    return x.clone(memory_format=torch.contiguous_format) if x.stride(-1) != 1 or any(s % 16 for s in steps) else x


def row_descriptors(x: Tensor, tokens: int, heads: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """x [T, H, D], read `tokens` by `heads` at a time in the two pieces of D; past the end it reads zeros."""
    x = copyable(x)
    d0, d1 = split_dim(x.shape[-1])
    first = TensorDescriptor(x, list(x.shape), list(x.stride()), [tokens, heads, d0])
    return first, TensorDescriptor(x, list(x.shape), list(x.stride()), [tokens, heads, d1]) if d1 else first


def slot_descriptors(x: Tensor, block: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """x [C, Hkv, D] as a matrix [C, Hkv * D], read `block` slots at a time in the two pieces of D (`split_dim`).

    Reads past the last slot give zeros. Where D is one power of two, the second descriptor is the first again.
    """
    slots, heads, d = x.shape
    matrix = copyable(x.contiguous()).view(slots, heads * d)
    d0, d1 = split_dim(d)
    first = TensorDescriptor.from_tensor(matrix, [block, d0])
    return first, TensorDescriptor.from_tensor(matrix, [block, d1]) if d1 else first


@triton.jit
def exponent(lse):
    """Natural lse as a power of two; +inf, hence weights of 0, for a row that saw nothing."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def seen_of(position, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """How many slots of its document a query at `position` sees: the blocks that end at or before it."""
    return tl.maximum(position + 1 + STRIDE - KERNEL, 0) // STRIDE


@triton.jit
def whole_slots(
    doc_ptr, position_ptr, cu_ptr, first_token, last_token, SLOTS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """[begin, whole): the slots that all queries from first_token to last_token see, a multiple of SLOTS; none if the
    queries are of several documents. begin is the first document's first slot."""
    doc = tl.load(doc_ptr + first_token)
    begin = tl.load(cu_ptr + doc) // STRIDE
    seen = seen_of(tl.load(position_ptr + first_token), KERNEL, STRIDE) // SLOTS * SLOTS
    return begin, begin + tl.where(doc == tl.load(doc_ptr + last_token), seen, 0)


@triton.jit
def doc_slots(doc, doc_ptr, position_ptr, cu_ptr, last_token, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """(begin, end): the slots of document `doc` that some query up to last_token sees.

    Sweeping document by document, each from its own first slot on, makes a query's result independent of what is packed
    beside its document, to the last bit.
    """
    start = tl.load(cu_ptr + doc)
    length = tl.load(cu_ptr + doc + 1) - start
    last = tl.where(doc == tl.load(doc_ptr + last_token), tl.load(position_ptr + last_token), length - 1)
    return start // STRIDE, start // STRIDE + seen_of(last, KERNEL, STRIDE)
