"""Selected attention by block rather than by query: forward and dq for groups too small to fill a tile with few tokens.

A tile of 64 rows holds the more tokens the fewer heads a group has, and the union of many tokens' blocks is mostly blocks
that few of them chose. Here a program takes a piece of a block's list of queries (inverse_index), so that every dot is of
a query and a block that belong together, and leaves a partial result for each entry of `indices`: o and lse of that
block alone, or its dq. A second kernel merges a query's partial results in the order of its entries. Segments of the
queries bound the memory of the partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.nsa.inverse_index import InverseIndex, invert
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.select_config import Tile, gather_length, partial_segment
from sieve.kernels.nsa.select_rows import (
    LOG2_E,
    key_descriptors,
    list_piece,
    own_queries_end,
    store_rows,
)  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "lists", "segment", "pieces", "first_token", "first_entry"])
def _attend_lists(
    q_ptr, k_desc, k_desc1, v_desc, v_desc1, do_ptr, lse_ptr, delta_ptr, part_ptr, part_lse_ptr,
    token_ptr, entry_ptr, offset_ptr, start_ptr, pieces_ptr, owner_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, num_heads, blocks, lists, segment, pieces, first_token, first_entry,
    length, scale,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A piece of a segment's lists: for each of its entries and heads, from the block's keys alone, o and lse (in powers of
    two), or with BACKWARD dq, to which do_ptr, lse_ptr and delta_ptr belong."""
    number = tl.load(owner_ptr + segment * pieces + tl.program_id(0))
    if number >= lists:
        return
    kv_head = number // blocks
    begin, end, _ = list_piece(
        number, tl.program_id(0), offset_ptr + segment * lists, pieces_ptr + segment * lists, length
    )
    first = tl.load(start_ptr + number - kv_head * blocks)
    k0 = k_desc.load([first, kv_head * (D0 + D1)])
    v0 = v_desc.load([first, kv_head * (E0 + E1)])
    if D1 > 0:
        k1 = k_desc1.load([first, kv_head * (D0 + D1) + D0])
    if E1 > 0:
        v1 = v_desc1.load([first, kv_head * (E0 + E1) + E0])
    own_end = own_queries_end(token_ptr, begin, end, first_token, first + BLOCK, KEYS)
    row = tl.arange(0, ROWS)
    slot = row // GROUP
    head = kv_head.to(tl.int64) * GROUP + row % GROUP
    key = tl.arange(0, KEYS)
    factor = scale * LOG2_E
    # The list is read a step ahead: the addresses of the loads of a step must not wait for it. Places past the end
    # repeat the last query and are not stored, so that the loads need no mask.
    next_token = tl.load(token_ptr + tl.minimum(begin + slot, end - 1))
    for n in range(begin, end, TOKENS):
        token = next_token.to(tl.int64)
        next_token = tl.load(token_ptr + tl.minimum(n + TOKENS + slot, end - 1))
        at_q = (token * stride_qt + head * stride_qh)[:, None]
        q0 = tl.load(q_ptr + at_q + tl.arange(0, D0)[None, :])
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            q1 = tl.load(q_ptr + at_q + (D0 + tl.arange(0, D1))[None, :])
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        if BLOCK < KEYS:
            s = tl.where(key[None, :] < BLOCK, s, float("-inf"))
        if n < own_end:  # not around loads that are pipelined: those of q and do stay outside
            before = tl.load(token_ptr + tl.minimum(n + slot, end - 1)) + (first_token - first)
            s = tl.where(key[None, :] <= before[:, None], s, float("-inf"))
        row_ok = (slot < TOKENS) & (n + slot < end)
        entry = tl.load(entry_ptr + n + slot, mask=row_ok, other=0) - first_entry
        at_part = entry.to(tl.int64) * GROUP + row % GROUP
        if BACKWARD:
            at_o = (token * stride_ot + head * stride_oh)[:, None]
            do0 = tl.load(do_ptr + at_o + tl.arange(0, E0)[None, :])
            dp = tl.dot(do0, tl.trans(v0), input_precision="ieee")
            if E1 > 0:
                do1 = tl.load(do_ptr + at_o + (E0 + tl.arange(0, E1))[None, :])
                dp = tl.dot(do1, tl.trans(v1), dp, input_precision="ieee")
            lse2 = tl.load(lse_ptr + token * num_heads + head) * LOG2_E
            delta = tl.load(delta_ptr + token * num_heads + head)
            p = tl.exp2(s * factor - lse2[:, None])
            ds = (p * (dp - delta[:, None])).to(k0.dtype)
            store_rows(part_ptr, at_part * (D0 + D1), tl.dot(ds, k0, input_precision="ieee") * scale, row_ok, 0, D0)
            if D1 > 0:
                store_rows(part_ptr, at_part * (D0 + D1), tl.dot(ds, k1, input_precision="ieee") * scale, row_ok, D0, D1)
        else:
            top = tl.max(s, 1) * factor
            p = tl.exp2(s * factor - top[:, None])
            total = tl.sum(p, 1)
            inverse = (1.0 / total)[:, None]
            p = p.to(v0.dtype)
            store_rows(part_ptr, at_part * (E0 + E1), tl.dot(p, v0, input_precision="ieee") * inverse, row_ok, 0, E0)
            if E1 > 0:
                store_rows(part_ptr, at_part * (E0 + E1), tl.dot(p, v1, input_precision="ieee") * inverse, row_ok, E0, E1)
            tl.store(part_lse_ptr + at_part, top + tl.log2(total), mask=row_ok)


@triton.jit
def _counts(indices_ptr, position, row, n, row_ok, BLOCK: tl.constexpr, TOPK: tl.constexpr):
    """Whether entry n of row `row` of indices [rows, topk] is in a list: see inverse_index."""
    block = tl.load(indices_ptr + row * TOPK + n, mask=row_ok, other=-1)
    before = tl.load(indices_ptr + row * TOPK + n - 1, mask=row_ok & (n > 0), other=-1)
    return row_ok & (block >= 0) & (block != before) & (block * BLOCK <= position)


@triton.jit(do_not_specialize=["first", "num_tokens"])
def _merge(
    part_ptr, part_lse_ptr, indices_ptr, position_ptr, out_ptr, lse_ptr, first, num_tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_UP: tl.constexpr, BACKWARD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Queries [first, first + num_tokens): the sum of their entries' partial results, weighed by lse unless BACKWARD."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # rows (token, head) of the segment
    row = at // GROUP  # (token, KV head)
    token = first + row // KV_HEADS
    row_ok = row < num_tokens * KV_HEADS
    column = tl.arange(0, D_UP)
    ok = row_ok[:, None] & (column[None, :] < D)
    position = tl.load(position_ptr + token, mask=row_ok, other=0)
    indices_ptr += first.to(tl.int64) * KV_HEADS * TOPK
    top = tl.full([ROWS], -1e38, tl.float32)
    if not BACKWARD:
        for n in range(TOPK):
            counts = _counts(indices_ptr, position, row, n, row_ok, BLOCK, TOPK)
            part_lse = tl.load(part_lse_ptr + (row * TOPK + n) * GROUP + at % GROUP, mask=counts, other=float("-inf"))
            top = tl.maximum(top, part_lse)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_UP], tl.float32)
    for n in range(TOPK):
        counts = _counts(indices_ptr, position, row, n, row_ok, BLOCK, TOPK)
        at_part = (row * TOPK + n) * GROUP + at % GROUP
        part = tl.load(part_ptr + at_part[:, None] * D + column[None, :], mask=counts[:, None] & ok, other=0.0)
        if BACKWARD:
            acc += part.to(tl.float32)
        else:
            weight = tl.exp2(tl.load(part_lse_ptr + at_part, mask=counts, other=float("-inf")) - top)
            total += weight
            acc += weight[:, None] * part.to(tl.float32)
    at_out = at + first.to(tl.int64) * (KV_HEADS * GROUP)
    if BACKWARD:
        if ADD:
            acc += tl.load(out_ptr + at_out[:, None] * D + column[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        some = total > 0
        total = tl.where(some, total, 1.0)
        acc = acc / total[:, None]
        tl.store(lse_ptr + at_out, tl.where(some, (top + tl.log2(total)) / LOG2_E, float("-inf")), mask=row_ok)
    tl.store(out_ptr + at_out[:, None] * D + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=ok)


class _Gather:
    """The segments of a launch: their lists, and room for a segment's partial results of `width` columns."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, packing: Packing, block_size: int, width: int, tile: Tile,
        first_token: int, segment: int | None,
    ) -> None:
        self.tokens, self.heads, d_qk = q.shape
        self.kv_heads, self.block_size, self.width, self.first_token = k.shape[1], block_size, width, first_token
        self.group, self.topk = self.heads // self.kv_heads, indices.shape[2]
        self.indices, self.position = indices.contiguous(), packing.position
        self.segment = segment or partial_segment(self.heads * self.topk * width * q.element_size())
        self.index: InverseIndex = invert(
            self.indices, packing, block_size, self.segment, gather_length(self.group), first_token=first_token
        )
        self.keys = max(triton.next_power_of_2(block_size), 16)
        self.descriptors = *key_descriptors(k, self.keys), *key_descriptors(v, self.keys)
        self.tile = tile
        (self.d0, self.d1), (self.e0, self.e1) = split_dim(d_qk), split_dim(v.shape[2])
        rows = min(self.segment, self.tokens) * self.heads * self.topk
        self.part = torch.empty(rows, width, dtype=q.dtype, device=q.device)
        self.part_lse = torch.empty(rows, dtype=torch.float32, device=q.device)

    def run(
        self, q: Tensor, do: Tensor, lse: Tensor, delta: Tensor, out: Tensor, out_lse: Tensor, scale: float, *,
        backward: bool, add: bool,
    ) -> None:
        """Segment by segment, the partial results and their merging into out [n, H, width] (and out_lse [n, H])."""
        index, per_token = self.index, self.kv_heads * self.topk
        for i in range(index.segments):
            first = i * self.segment
            count = min(self.segment, self.tokens - first)
            _attend_lists[(index.owner.shape[1],)](
                q, *self.descriptors, do, lse, delta, self.part, self.part_lse,
                index.token, index.entry, index.offset, index.start, index.pieces[0], index.owner,
                q.stride(0), q.stride(1), do.stride(0), do.stride(1), self.heads, index.blocks, index.lists, i,
                index.owner.shape[1], self.first_token, first * per_token, index.length, scale,
                GROUP=self.group, TOKENS=self.tile.tokens(self.group), ROWS=self.tile.rows, KEYS=self.keys,
                BLOCK=self.block_size, D0=self.d0, D1=self.d1, E0=self.e0, E1=self.e1, BACKWARD=backward,
                num_warps=self.tile.num_warps, num_stages=self.tile.num_stages,
            )  # fmt: skip
            rows = 16
            _merge[(triton.cdiv(count * self.heads, rows),)](
                self.part, self.part_lse, self.indices, self.position, out, out_lse, first, count,
                GROUP=self.group, KV_HEADS=self.kv_heads, TOPK=self.topk, BLOCK=self.block_size, ROWS=rows,
                D=self.width, D_UP=triton.next_power_of_2(self.width), BACKWARD=backward, ADD=add,
            )  # fmt: skip


def gathered_forward(
    q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, packing: Packing, block_size: int, *, scale: float,
    first_token: int, tile: Tile, segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What selected_attention_fwd returns. segment: queries whose partial results are held at once; default by a table."""
    o = torch.empty(*q.shape[:2], v_slc.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    gather = _Gather(q, k_slc, v_slc, indices, packing, block_size, v_slc.shape[2], tile, first_token, segment)
    gather.run(q, q, lse, lse, o, lse, scale, backward=False, add=False)
    return o, lse


def gathered_dq(
    do: Tensor, q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, lse: Tensor, delta: Tensor, packing: Packing,
    block_size: int, *, scale: float, dq: Tensor, add: bool, tile: Tile, segment: int | None = None,
) -> None:
    """What selected_dq leaves in (or with `add` adds to) dq [T, H, Dqk], contiguous."""
    gather = _Gather(q, k_slc, v_slc, indices, packing, block_size, q.shape[2], tile, 0, segment)
    gather.run(q, do, lse, delta, dq, lse, scale, backward=True, add=add)
