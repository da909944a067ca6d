"""Selected attention, forward: launcher, and the Triton kernel for what the Hopper one (select_hopper) does not serve.

A tile is a few neighbouring tokens with all heads of one KV group, 64 rows for the tensor cores; it runs over the union
of its tokens' blocks (select_union), each loaded once, and hides a block from the rows that did not choose it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.select_config import Tile, by_list, forward_tile, gather_tile
from sieve.kernels.nsa.select_gather import gathered_forward
from sieve.kernels.nsa.select_hopper import attend_union, serves
from sieve.kernels.nsa.select_rows import LOG2_E, check_scale, key_descriptors, last_key, load_rows, store_rows, tile_rows
from sieve.kernels.nsa.select_union import unite_blocks


@triton.jit(do_not_specialize=["num_tokens", "first_token"])
def _forward(
    q_ptr, k_desc, k_desc1, v_desc, v_desc1, o_ptr, lse_ptr, start_ptr, members_ptr, count_ptr,
    stride_qt, stride_qh, num_tokens, first_token, num_heads, scale,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    slot, token, head, row_ok = tile_rows(num_tokens, GROUP, TOKENS, ROWS)
    at_q = token.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    q0 = load_rows(q_ptr, at_q, row_ok, 0, D0)
    if D1 > 0:
        q1 = load_rows(q_ptr, at_q, row_ok, D0, D1)
    tile = kv_head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    start_ptr += tile * CAPACITY
    members_ptr += tile * CAPACITY
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    steps = tl.load(count_ptr + tile) * PARTS

    factor = scale * LOG2_E
    key = tl.arange(0, KEYS)
    top = tl.full([ROWS], -1e38, tl.float32)  # finite: a row that sees nothing of a block adds exp2(-inf) = 0, not NaN
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, E0], tl.float32)
    if E1 > 0:
        acc1 = tl.zeros([ROWS, E1], tl.float32)
    # The list is read a step ahead: the addresses of the loads of a step must not wait for it.
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
        last = last_key(first, start, bits, slot, first_token + token, KEYS, BLOCK)
        s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s * factor - (higher * factor)[:, None])
        shrink = tl.exp2((top - higher) * factor)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        v0 = v_desc.load([first, kv_head * (E0 + E1)])
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
        if E1 > 0:
            v1 = v_desc1.load([first, kv_head * (E0 + E1) + E0])
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")

    at_o = token.to(tl.int64) * num_heads + head
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(lse_ptr + at_o, tl.where(some, top * scale + tl.log(total), float("-inf")), mask=row_ok)
    inverse = (1.0 / total)[:, None]  # acc is 0 where there was nothing to sum
    store_rows(o_ptr, at_o * (E0 + E1), acc0 * inverse, row_ok, 0, E0)
    if E1 > 0:
        store_rows(o_ptr, at_o * (E0 + E1), acc1 * inverse, row_ok, E0, E1)


def selected_attention_fwd(
    q: Tensor, k_slc: Tensor, v_slc: Tensor, indices: Tensor, packing: Packing, geometry: Geometry, *, scale: float,
    first_token: int = 0, tile: Tile | None = None, lists: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations 11 and 12: attention over the tokens of the selected blocks, up to the query's own.

    q [n, H, Dqk], k_slc [T, Hkv, Dqk], v_slc [T, Hkv, Dv] of one dtype (bf16, fp16, fp32); indices int32
    [n, Hkv, topk]: block numbers within the query's document, ascending, -1 = none. The queries are the packed tokens
    [first_token, first_token + n), and packing.doc and .position are theirs. Returns o [n, H, Dv] in q's dtype and lse
    fp32 [n, H] (natural log); a query without a block has o exactly 0 and lse -inf. `tile`, and `lists` (select_gather's
    kernels rather than these), override the tables.
    Raises ValueError for a head dimension without a kernel or a scale that is not positive.
    """
    check_scale(scale)
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k_slc.shape[1], v_slc.shape[2]
    (d0, d1), (e0, e1), group = split_dim(d_qk), split_dim(d_v), heads // kv_heads
    q = q if q.stride(2) == 1 else q.contiguous()
    shape = group, d_qk, d_v, geometry.block_size, q.element_size()
    if tokens and (by_list(*shape) if lists is None else lists):
        tile = tile or gather_tile(group, d_qk, d_v, backward=False)
        return gathered_forward(
            q, k_slc, v_slc, indices, packing, geometry.block_size, scale=scale, first_token=first_token, tile=tile
        )
    o = torch.empty(tokens, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return o, lse
    if tile is None and serves(q, kv_heads, d_v, geometry.block_size):
        union = unite_blocks(indices, packing, geometry.block_size, 64 // group, first_token)
        attend_union(q, k_slc, v_slc, union, geometry.block_size, o, lse, scale=scale, first_token=first_token)
        return o, lse
    tile = tile or forward_tile(*shape)
    union = unite_blocks(indices, packing, geometry.block_size, tile.tokens(group), first_token)
    _forward[(union.tiles, kv_heads)](
        q, *key_descriptors(k_slc, tile.keys), *key_descriptors(v_slc, tile.keys), o, lse,
        union.start, union.members, union.count, q.stride(0), q.stride(1), tokens, first_token, heads, scale,
        GROUP=group, TOKENS=union.tokens, ROWS=tile.rows, KEYS=tile.keys, BLOCK=geometry.block_size,
        CAPACITY=union.capacity, D0=d0, D1=d1, E0=e0, E1=e1, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return o, lse
