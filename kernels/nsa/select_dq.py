"""Selected attention, backward for q: the forward's tiles over the union of their blocks, so no sum needs an atomic.

With P = exp(scale * q k^T - lse): dS = P * (dO v^T - delta), dq = scale * dS k, where delta = sum(o * dO) over Dv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.select_config import Tile, by_list, dq_tile, gather_tile
from sieve.kernels.nsa.select_dq_hopper import union_dq
from sieve.kernels.nsa.select_gather import gathered_dq
from sieve.kernels.nsa.select_hopper import serves
from sieve.kernels.nsa.select_rows import LOG2_E, check_scale, key_descriptors, last_key, load_rows, store_rows, tile_rows
from sieve.kernels.nsa.select_union import unite_blocks


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_q(
    q_ptr, k_desc, k_desc1, v_desc, v_desc1, do_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, members_ptr, count_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, num_tokens, num_heads, scale,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    slot, token, head, row_ok = tile_rows(num_tokens, GROUP, TOKENS, ROWS)
    token64 = token.to(tl.int64)
    at_q = token64 * stride_qt + head.to(tl.int64) * stride_qh
    at_o = token64 * stride_ot + head.to(tl.int64) * stride_oh
    q0 = load_rows(q_ptr, at_q, row_ok, 0, D0)
    do0 = load_rows(do_ptr, at_o, row_ok, 0, E0)
    if D1 > 0:
        q1 = load_rows(q_ptr, at_q, row_ok, D0, D1)
    if E1 > 0:
        do1 = load_rows(do_ptr, at_o, row_ok, E0, E1)
    at_row = token64 * num_heads + head
    lse2 = tl.load(lse_ptr + at_row, mask=row_ok, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + at_row, mask=row_ok, other=0.0)
    tile = kv_head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    start_ptr += tile * CAPACITY
    members_ptr += tile * CAPACITY
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    steps = tl.load(count_ptr + tile) * PARTS

    factor = scale * LOG2_E
    key = tl.arange(0, KEYS)
    dq0 = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        dq1 = tl.zeros([ROWS, D1], tl.float32)
    next_start = tl.load(start_ptr)
    next_bits = tl.load(members_ptr)
    for i in range(0, steps):
        start = next_start
        bits = next_bits
        following = tl.minimum(i + 1, steps - 1) // PARTS
        next_start = tl.load(start_ptr + following)
        next_bits = tl.load(members_ptr + following)
        first = start + (i % PARTS) * KEYS
        k0 = k_desc.load([first, kv_head * (D0 + D1)])
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            k1 = k_desc1.load([first, kv_head * (D0 + D1) + D0])
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        v0 = v_desc.load([first, kv_head * (E0 + E1)])
        dp = tl.dot(do0, tl.trans(v0), input_precision="ieee")
        if E1 > 0:
            v1 = v_desc1.load([first, kv_head * (E0 + E1) + E0])
            dp = tl.dot(do1, tl.trans(v1), dp, input_precision="ieee")
        last = last_key(first, start, bits, slot, token, KEYS, BLOCK)
        p = tl.where(key[None, :] <= last[:, None], tl.exp2(s * factor - lse2[:, None]), 0.0)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")

    at_dq = at_row * (D0 + D1)
    dq0 *= scale
    if ADD:
        dq0 += load_rows(dq_ptr, at_dq, row_ok, 0, D0).to(tl.float32)
    store_rows(dq_ptr, at_dq, dq0, row_ok, 0, D0)
    if D1 > 0:
        dq1 *= scale
        if ADD:
            dq1 += load_rows(dq_ptr, at_dq, row_ok, D0, D1).to(tl.float32)
        store_rows(dq_ptr, at_dq, dq1, row_ok, D0, D1)


def selected_dq(
    do: Tensor, q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, lse: Tensor, delta: Tensor, packing: Packing,
    geometry: Geometry, *, scale: float, dq: Tensor | None = None, tile: Tile | None = None,
    lists: bool | None = None,
) -> Tensor:
    """dq [T, H, Dqk] of selected_attention_fwd in q's dtype; added to `dq` (contiguous) in place where one is given.

    do [T, H, Dv]; lse, delta fp32 [T, H] contiguous, delta = sum(o * do) over Dv. With lse lowered by log g, and do
    the gradient of a gated output g * o, the results are the gradients through the gate. `tile` and `lists` (select_gather's
    kernels rather than these) override the tables.
    """
    check_scale(scale)
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k_slc.shape[1], v_slc.shape[2]
    add = dq is not None
    dq = dq if add else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (d0, d1), (e0, e1), group = split_dim(d_qk), split_dim(d_v), heads // kv_heads
    if tokens == 0:
        return dq
    q, do = (x if x.stride(2) == 1 else x.contiguous() for x in (q, do))
    shape = group, d_qk, d_v, geometry.block_size, q.element_size()
    if by_list(*shape) if lists is None else lists:
        tile = tile or gather_tile(group, d_qk, d_v, backward=True)
        rest = k_slc, v_slc, indices, lse, delta, packing, geometry.block_size
        gathered_dq(do, q, *rest, scale=scale, dq=dq, add=add, tile=tile)
        return dq
    if tile is None and serves(q, kv_heads, d_v, geometry.block_size):
        union = unite_blocks(indices, packing, geometry.block_size, 64 // group)
        union_dq(do, q, k_slc, v_slc, union, geometry.block_size, lse, delta, dq, scale=scale, add=add)
        return dq
    tile = tile or dq_tile(*shape)
    union = unite_blocks(indices, packing, geometry.block_size, tile.tokens(group))
    _backward_q[(union.tiles, kv_heads)](
        q, *key_descriptors(k_slc, tile.keys), *key_descriptors(v_slc, tile.keys), do, lse, delta, dq,
        union.start, union.members, union.count, q.stride(0), q.stride(1), do.stride(0), do.stride(1),
        tokens, heads, scale,
        GROUP=group, TOKENS=union.tokens, ROWS=tile.rows, KEYS=tile.keys, BLOCK=geometry.block_size,
        CAPACITY=union.capacity, D0=d0, D1=d1, E0=e0, E1=e1, ADD=add,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq
