"""Selected attention, backward for k and v: by block, over exactly the queries that chose it.

dk = scale * dS^T q and dv = P^T dO, with P and dS as in select_dq. A program takes a piece of a block's list of queries
(inverse_index) and holds the block's keys as the rows of its dots, P^T and dS^T. A list of one piece stores its sums at
once, the pieces of a longer one leave partial sums that a second kernel adds in order: no sum needs an atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.inverse_index import InverseIndex, invert
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.select_config import Tile, dkv_tile, piece_length
from sieve.kernels.nsa.select_rows import (
    LOG2_E,
    check_scale,
    key_descriptors,
    list_piece,
    load_rows,
    own_queries_end,
    store_rows,
)  # fmt: skip

GATHER_BYTES = 2**28  # up to this size, the rows' lse and delta are copied into the lists' order, which gains 3 %


@triton.jit
def _gather_rows(
    lse_ptr, delta_ptr, token_ptr, list_ptr, lse2_ptr, delta_out_ptr, entries, size, blocks, none, num_heads,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """lse (in powers of two) and delta of the rows in the lists' order, where the main loop reads them in one run.

    Unused rows get 0: the main loop reads past a list's end, and weighs it 0, which takes a finite delta.
    """
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    entry = row // GROUP
    number = tl.load(list_ptr + entry, mask=entry < entries, other=none)
    ok = number < none
    head = (number // blocks) % KV_HEADS * GROUP + row % GROUP
    at = tl.load(token_ptr + entry, mask=ok, other=0).to(tl.int64) * num_heads + head
    tl.store(lse2_ptr + row, tl.load(lse_ptr + at, mask=ok, other=0.0) * LOG2_E, mask=row < size)
    tl.store(delta_out_ptr + row, tl.load(delta_ptr + at, mask=ok, other=0.0), mask=row < size)


@triton.jit
def _store_part(out_ptr, partial_ptr, at_out, at_part, x, key_ok, row, FROM: tl.constexpr, D: tl.constexpr):
    """A list's only piece goes to the sums, one of several to the partial sums."""
    if row < 0:
        store_rows(out_ptr, at_out, x, key_ok, FROM, D)
    else:
        store_rows(partial_ptr, at_part, x, key_ok, FROM, D)


@triton.jit
def _first_row(number, several_ptr, offset_ptr, length):
    """Where the partial sums of a list of several pieces begin; -1 for a list of one piece."""
    count = tl.cdiv(tl.load(offset_ptr + number + 1) - tl.load(offset_ptr + number), length)
    return tl.where(count > 1, tl.load(several_ptr + number) - count, -1)


@triton.jit
def _keys_of(block, start_ptr, end_ptr, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's KEYS keys of the block: (place in the block, packed index, whether it is the block's)."""
    local = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = tl.load(start_ptr + block) + local
    return local, key, (key < tl.load(end_ptr + block)) & (local < BLOCK)


@triton.jit(do_not_specialize=["blocks", "lists"])
def _backward_kv(
    q_ptr, k_desc, k_desc1, v_desc, v_desc1, do_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, partial_k_ptr, partial_v_ptr, token_ptr, offset_ptr, start_ptr, end_ptr, pieces_ptr, several_ptr, owner_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, num_heads, blocks, lists, length, scale,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_UP: tl.constexpr, KV_HEADS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    GATHERED: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """One of the lists' pieces, and KEYS keys of its block.

    GATHERED: lse_ptr and delta_ptr are _gather_rows' outputs. WIDE: offsets in q and do need 64 bits. ALIKE: q and do
    have the same strides. The last two save registers, of which this loop has none to spare.
    """
    number = tl.load(owner_ptr + tl.program_id(0))
    if number >= lists:
        return
    kv_head = number // blocks
    block = number - kv_head * blocks
    begin, end, nth = list_piece(number, tl.program_id(0), offset_ptr, pieces_ptr, length)
    first = tl.load(start_ptr + block) + tl.program_id(1) * KEYS
    # Keys past the block's end are read too: they only add to rows of dk and dv that are not stored.
    k0 = k_desc.load([first, kv_head * (D0 + D1)])
    v0 = v_desc.load([first, kv_head * (E0 + E1)])
    dk0 = tl.zeros([KEYS, D0], tl.float32)
    dv0 = tl.zeros([KEYS, E0], tl.float32)
    if D1 > 0:
        k1 = k_desc1.load([first, kv_head * (D0 + D1) + D0])
        dk1 = tl.zeros([KEYS, D1], tl.float32)
    if E1 > 0:
        v1 = v_desc1.load([first, kv_head * (E0 + E1) + E0])
        dv1 = tl.zeros([KEYS, E1], tl.float32)

    # Only a block's own tokens may stand before its last key.
    own_end = own_queries_end(token_ptr, begin, end, 0, first + KEYS, BLOCK_UP)
    q_head = kv_head.to(tl.int64) * GROUP
    q_ptr += q_head * stride_qh
    do_ptr += q_head * stride_oh
    if not GATHERED:
        lse_ptr += q_head
        delta_ptr += q_head
    factor = scale * LOG2_E
    query = tl.arange(0, ROWS)
    slot = query // GROUP
    head = (query % GROUP).to(tl.int64) if WIDE else query % GROUP
    # The list is read a step ahead: the addresses of the loads of a step must not wait for it. Places past the end
    # repeat the last query and are weighed 0, so that the loads need no mask.
    last = tl.maximum(end - 1, 0)
    next_token = tl.load(token_ptr + tl.minimum(begin + slot, last))
    for n in range(begin, end, TOKENS):
        token = next_token.to(tl.int64) if WIDE else next_token
        next_token = tl.load(token_ptr + tl.minimum(n + TOKENS + slot, last))
        row_ok = n + slot < end
        if TOKENS * GROUP < ROWS:
            row_ok = row_ok & (slot < TOKENS)
        at_q = (token * stride_qt + head * stride_qh)[:, None]
        at_o = at_q if ALIKE else (token * stride_ot + head * stride_oh)[:, None]
        q0 = tl.load(q_ptr + at_q + tl.arange(0, D0)[None, :])
        do0 = tl.load(do_ptr + at_o + tl.arange(0, E0)[None, :])
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        if D1 > 0:
            q1 = tl.load(q_ptr + at_q + (D0 + tl.arange(0, D1))[None, :])
            s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
        if GATHERED:
            at_row = tl.cast(n, tl.int64) * GROUP
            lse2 = tl.load(lse_ptr + at_row + query)
            delta = tl.load(delta_ptr + at_row + query)
        else:
            lse2 = tl.load(lse_ptr + token * num_heads + head) * LOG2_E
            delta = tl.load(delta_ptr + token * num_heads + head)
        p = tl.exp2(s * factor - tl.where(row_ok, lse2, float("inf"))[None, :])
        if n < own_end:  # not around loads that are pipelined: those of q and do stay outside
            before = tl.load(token_ptr + tl.minimum(n + slot, last)) - first
            p = tl.where(tl.arange(0, KEYS)[:, None] <= before[None, :], p, 0.0)
        dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="ieee")
        dp = tl.dot(v0, tl.trans(do0), input_precision="ieee")
        if E1 > 0:
            do1 = tl.load(do_ptr + at_o + (E0 + tl.arange(0, E1))[None, :])
            dv1 = tl.dot(p.to(do1.dtype), do1, dv1, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")

    row = _first_row(number, several_ptr, offset_ptr, length)
    local, key, key_ok = _keys_of(block, start_ptr, end_ptr, KEYS, BLOCK)
    at_out = key.to(tl.int64) * KV_HEADS + kv_head
    at_part = (row + nth).to(tl.int64) * (tl.num_programs(1) * KEYS) + local
    _store_part(dk_ptr, partial_k_ptr, at_out * (D0 + D1), at_part * (D0 + D1), dk0 * scale, key_ok, row, 0, D0)
    _store_part(dv_ptr, partial_v_ptr, at_out * (E0 + E1), at_part * (E0 + E1), dv0, key_ok, row, 0, E0)
    if D1 > 0:
        _store_part(dk_ptr, partial_k_ptr, at_out * (D0 + D1), at_part * (D0 + D1), dk1 * scale, key_ok, row, D0, D1)
    if E1 > 0:
        _store_part(dv_ptr, partial_v_ptr, at_out * (E0 + E1), at_part * (E0 + E1), dv1, key_ok, row, E0, E1)


@triton.jit
def _add_columns(partial_ptr, out_ptr, at_out, at_part, step, count, key_ok, D: tl.constexpr):
    """Sum `count` partial sums, `step` rows apart, in order."""
    STEP: tl.constexpr = 32 if D % 32 == 0 else 16
    for column in range(0, D, STEP):
        total = load_rows(partial_ptr + column, at_part * D, key_ok, 0, STEP)
        for i in range(1, count):
            total += load_rows(partial_ptr + column, (at_part + i * step) * D, key_ok, 0, STEP)
        store_rows(out_ptr + column, at_out * D, total, key_ok, 0, STEP)


@triton.jit(do_not_specialize=["blocks"])
def _add_partials(
    partial_k_ptr, partial_v_ptr, dk_ptr, dv_ptr, offset_ptr, start_ptr, end_ptr, several_ptr, blocks, length,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The sums of a list of several pieces, from the pieces' partial sums."""
    number = tl.program_id(0)
    row = _first_row(number, several_ptr, offset_ptr, length)
    if row < 0:
        return
    kv_head = number // blocks
    local, key, key_ok = _keys_of(number - kv_head * blocks, start_ptr, end_ptr, KEYS, BLOCK)
    count = tl.cdiv(tl.load(offset_ptr + number + 1) - tl.load(offset_ptr + number), length)
    step = (tl.num_programs(1) * KEYS).to(tl.int64)
    at_out = key.to(tl.int64) * KV_HEADS + kv_head
    _add_columns(partial_k_ptr, dk_ptr, at_out, row * step + local, step, count, key_ok, DK)
    _add_columns(partial_v_ptr, dv_ptr, at_out, row * step + local, step, count, key_ok, DV)


def _gathered(lse: Tensor, delta: Tensor, index: InverseIndex, kv_heads: int, rows: int) -> tuple[Tensor, Tensor]:
    """lse and delta of every entry's rows in the order of index.token, fp32 [entries * group + rows], 0 at the end."""
    entries, heads = index.token.numel(), lse.shape[1]
    group = heads // kv_heads
    size = entries * group + rows
    out = [torch.empty(size, dtype=torch.float32, device=lse.device) for _ in range(2)]
    _gather_rows[(triton.cdiv(size, 1024),)](
        lse, delta, index.token, index.list, *out, entries, size, index.blocks, index.segments * index.lists, heads,
        GROUP=group, KV_HEADS=kv_heads, SIZE=1024,
    )  # fmt: skip
    return out[0], out[1]


def _reach(x: Tensor, group: int) -> int:
    """Past the largest offset within x [T, H, D] of a token and one of `group` heads."""
    return x.shape[0] * x.stride(0) + group * x.stride(1) + x.shape[2]


def selected_dkv(
    do: Tensor, q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, lse: Tensor, delta: Tensor, packing: Packing,
    geometry: Geometry, *, scale: float, tile: Tile | None = None, length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """dk [T, Hkv, Dqk] and dv [T, Hkv, Dv] of selected_attention_fwd in k's dtype; arguments as selected_dq's.

    `tile` and `length` (queries in a piece of a list) override the tables' launch. Beyond inputs and outputs it holds some
    20 bytes an entry of indices, up to GATHER_BYTES of rows, and the fp32 sums of a block for each length / 2 entries.
    """
    check_scale(scale)
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k_slc.shape[1], v_slc.shape[2]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k_slc, v_slc))
    (d0, d1), (e0, e1), group, block_size = split_dim(d_qk), split_dim(d_v), heads // kv_heads, geometry.block_size
    if tokens == 0:
        return dk, dv
    tile = tile or dkv_tile(group, d_qk, d_v, block_size, q.element_size())
    entries = indices.numel()
    length = length or piece_length(entries)
    index = invert(indices, packing, block_size, tokens, length, least=1)
    gathered = 8 * entries * group <= GATHER_BYTES
    if gathered:
        lse, delta = _gathered(lse, delta, index, kv_heads, tile.rows)
    q, do = (x if x.stride(2) == 1 else x.contiguous() for x in (q, do))
    parts = triton.cdiv(block_size, tile.keys)
    partial = [torch.empty(index.rows, parts * tile.keys, d, dtype=torch.float32, device=q.device) for d in (d_qk, d_v)]
    descriptors = *key_descriptors(k_slc, tile.keys), *key_descriptors(v_slc, tile.keys)
    lists = index.offset, index.start, index.end
    common = {"KEYS": tile.keys, "BLOCK": block_size, "KV_HEADS": kv_heads}
    _backward_kv[(index.owner.shape[1], parts)](
        q, *descriptors, do, lse, delta, dk, dv, *partial, index.token, *lists, *index.pieces, index.owner,
        q.stride(0), q.stride(1), do.stride(0), do.stride(1), heads, index.blocks, index.lists, length, scale,
        GROUP=group, TOKENS=tile.tokens(group), ROWS=tile.rows, BLOCK_UP=triton.next_power_of_2(block_size),
        D0=d0, D1=d1, E0=e0, E1=e1, GATHERED=gathered, WIDE=max(_reach(q, group), _reach(do, group)) >= 2**31,
        ALIKE=q.stride() == do.stride(), num_warps=tile.num_warps, num_stages=tile.num_stages, **common,
    )  # fmt: skip
    if index.rows:
        _add_partials[(index.lists, parts)](
            *partial, dk, dv, *lists, index.pieces[1], index.blocks, length, DK=d_qk, DV=d_v, **common
        )
    return dk, dv
