"""Compression attention, backward: dk and dv, by tiles of slots, split over the queries.

dv = P^T dO, dk = scale * dS^T q, summed over the queries that see the slot and the heads of the group. There are few
slots and many queries, so each tile of slots is cut into `splits` runs of queries, whose sums are stored in fp32 and
added up in one order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.nsa.compress_tiles import Tile, dkv_splits, dkv_tile, exponent, row_descriptors, seen_of
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing


@triton.jit(do_not_specialize=["num_tokens", "length"])
def _prepare(
    lse_ptr, delta_ptr, doc_ptr, position_ptr, cu_ptr, stats_ptr, seen_ptr, num_tokens, length,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows (token, head of the group, padded to a power of two) in a line for each KV head, so that a tile is one run.

    stats fp32 [2, Hkv, length]: lse in powers of two, +inf for rows that count for nothing, and delta.
    seen int32 [2, length]: the slots [first, end) that the row sees.
    """
    kv_head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = row // PADDED
    head = (row % PADDED).to(tl.int32)
    inside = row < length
    valid = (token < num_tokens) & (head < GROUP)
    at = token * HEADS + kv_head * GROUP + head
    lse = exponent(tl.load(lse_ptr + at, mask=valid, other=float("inf")))
    delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
    out = stats_ptr + kv_head.to(tl.int64) * length + row
    tl.store(out, lse, mask=inside)
    tl.store(out + HEADS // GROUP * length.to(tl.int64), delta, mask=inside)
    token = tl.minimum(token, num_tokens - 1)
    first = tl.load(cu_ptr + tl.load(doc_ptr + token)) // STRIDE
    end = first + seen_of(tl.load(position_ptr + token), KERNEL, STRIDE)
    mine = inside & (kv_head == 0)
    tl.store(seen_ptr + row, tl.where(valid, first, 0), mask=mine)
    tl.store(seen_ptr + length + row, tl.where(valid, end, 0), mask=mine)


@triton.jit
def _sweep(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q0_desc, q1_desc, do0_desc, do1_desc, stats_desc, seen_desc, kv_head, slot,
    begin_token, step, steps, gap_at, gap, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add up dk and dv over the steps [step, steps) of ROWS // PADDED queries each.

    MASKED if some of them do not see every slot. From the step `gap_at` on, `gap` steps are left out.
    """
    TOKENS: tl.constexpr = ROWS // PADDED
    for i in range(step, steps):
        token = begin_token + tl.where(i < gap_at, i, i + gap) * TOKENS
        head = kv_head * GROUP
        # No load between two products that can overlap: the wait for it would serialize them. The products of one
        # step's scores have ended where lse is read; the sums dv and dk run on while the next step starts.
        q0 = q0_desc.load([token, head, 0]).reshape(ROWS, D0)
        do0 = do0_desc.load([token, head, 0]).reshape(ROWS, E0)
        if D1 > 0:
            q1 = q1_desc.load([token, head, D0]).reshape(ROWS, D1)
        if E1 > 0:
            do1 = do1_desc.load([token, head, E0]).reshape(ROWS, E1)
        s = tl.dot(k0, q0.T, input_precision="ieee")  # [slots, rows]
        if D1 > 0:
            s = tl.dot(k1, q1.T, s, input_precision="ieee")
        dp = tl.dot(v0, do0.T, input_precision="ieee")
        if E1 > 0:
            dp = tl.dot(v1, do1.T, dp, input_precision="ieee")
        if MASKED:
            s = tl.where(slot[:, None] >= seen_desc.load([0, token * PADDED]), s, float("-inf"))
            s = tl.where(slot[:, None] < seen_desc.load([1, token * PADDED]), s, float("-inf"))
        p = tl.exp2(s * factor - stats_desc.load([kv_head, token * PADDED]))
        dp -= stats_desc.load([HEADS // GROUP + kv_head, token * PADDED])
        dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="ieee")
        if E1 > 0:
            dv1 = tl.dot(p.to(do0.dtype), do1, dv1, input_precision="ieee")
        ds = (p * dp).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["num_slots"])
def _backward_kv(
    q0_desc, q1_desc, do0_desc, do1_desc, stats_desc, seen_desc, k_ptr, v_ptr, doc_ptr, cu_ptr, dk_ptr, dv_ptr,
    num_slots, factor, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    # Early slots are seen by the most queries: they start first.
    first_slot = tl.program_id(0) // SPLITS * SLOTS
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(1)
    KV_HEADS: tl.constexpr = HEADS // GROUP

    # Slot s holds tokens that start within [s * STRIDE, (s + 1) * STRIDE), so a document that has blocks in this tile
    # ends no later than that of the token (last_slot + 1) * STRIDE - 1, and no query before
    # first_slot * STRIDE + KERNEL - 1 sees any of them. Once a query of that last document sees the last slot, it and
    # all later ones see the whole tile, if the tile holds no other document's slots.
    end_slot = tl.minimum(first_slot + SLOTS, num_slots)
    last_doc = tl.load(doc_ptr + end_slot * STRIDE - 1)
    doc_start = tl.load(cu_ptr + last_doc)
    end_token = tl.load(cu_ptr + last_doc + 1)
    # Rounded down, since the copy engine reads lines of rows from multiples of 16 bytes on; what is early is masked.
    begin_token = tl.minimum((first_slot * STRIDE + KERNEL - 1) // 4 * 4, end_token)
    doc_slot = doc_start // STRIDE
    whole_token = tl.where(
        doc_slot <= first_slot, doc_start + (first_slot + SLOTS - 1 - doc_slot) * STRIDE + KERNEL - 1, end_token
    )
    # Runs are multiples of a step, so that only the last step of the last run reaches past the document, into rows that
    # see none of its slots. It is masked, like the steps before whole_token; those between need no mask.
    TOKENS: tl.constexpr = ROWS // PADDED
    run = tl.cdiv(tl.cdiv(end_token - begin_token, SPLITS), ROWS) * ROWS
    begin_token = tl.minimum(begin_token + split * run, end_token)
    end_token = tl.minimum(begin_token + run, end_token)
    head_steps = tl.cdiv(tl.minimum(tl.maximum(whole_token, begin_token), end_token) - begin_token, TOKENS)
    steps = tl.cdiv(end_token - begin_token, TOKENS)
    whole_steps = tl.maximum((end_token - begin_token) // TOKENS - head_steps, 0)

    slot = first_slot + tl.arange(0, SLOTS)
    slot_ok = slot < num_slots
    slot64 = (tl.minimum(slot, num_slots - 1).to(tl.int64) * KV_HEADS + kv_head)[:, None]
    k_at = k_ptr + slot64 * (D0 + D1)
    v_at = v_ptr + slot64 * (E0 + E1)
    k0 = tl.load(k_at + tl.arange(0, D0)[None, :])
    v0 = tl.load(v_at + tl.arange(0, E0)[None, :])
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = tl.load(k_at + D0 + tl.arange(0, D1)[None, :])
    if E1 > 0:
        v1 = tl.load(v_at + E0 + tl.arange(0, E1)[None, :])
    dk0 = tl.zeros([SLOTS, D0], tl.float32)
    dk1 = tl.zeros([SLOTS, D1 if D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([SLOTS, E0], tl.float32)
    dv1 = tl.zeros([SLOTS, E1 if E1 > 0 else 1], tl.float32)
    dk0, dk1, dv0, dv1 = _sweep(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q0_desc, q1_desc, do0_desc, do1_desc, stats_desc, seen_desc, kv_head, slot,
        begin_token, 0, steps - whole_steps, head_steps, whole_steps, factor,
        HEADS, GROUP, D0, D1, E0, E1, ROWS, PADDED, True,
    )  # fmt: skip
    dk0, dk1, dv0, dv1 = _sweep(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q0_desc, q1_desc, do0_desc, do1_desc, stats_desc, seen_desc, kv_head, slot,
        begin_token, head_steps, head_steps + whole_steps, steps, 0, factor,
        HEADS, GROUP, D0, D1, E0, E1, ROWS, PADDED, False,
    )  # fmt: skip

    part = (split.to(tl.int64) * num_slots + slot.to(tl.int64)) * KV_HEADS + kv_head
    dk_at = dk_ptr + (part * (D0 + D1))[:, None]
    dv_at = dv_ptr + (part * (E0 + E1))[:, None]
    tl.store(dk_at + tl.arange(0, D0)[None, :], dk0 * scale, mask=slot_ok[:, None])
    tl.store(dv_at + tl.arange(0, E0)[None, :], dv0, mask=slot_ok[:, None])
    if D1 > 0:
        tl.store(dk_at + D0 + tl.arange(0, D1)[None, :], dk1 * scale, mask=slot_ok[:, None])
    if E1 > 0:
        tl.store(dv_at + E0 + tl.arange(0, E1)[None, :], dv1, mask=slot_ok[:, None])


def compressed_dkv(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, lse: Tensor, delta: Tensor, packing: Packing,
    geometry: Geometry, *, scale: float, tile: Tile | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients dk_cmp [C, Hkv, Dqk] and dv_cmp [C, Hkv, Dv], 0 in slots that no query sees.

    Arguments as `compressed_dq`'s; packing lays out all T tokens of q.
    """
    tokens, heads, d_qk = q.shape
    slots, kv_heads, d_v = v_cmp.shape
    (d0, d1), (e0, e1) = split_dim(d_qk), split_dim(d_v)
    if not tokens or not slots:
        return torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)
    tile = tile or dkv_tile(d_qk, d_v, q.dtype)
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    rows = max(tile.rows, padded)
    tiles = triton.cdiv(slots, tile.slots)
    splits = splits or dkv_splits(tiles * kv_heads)
    length = triton.cdiv(tokens * padded, 4) * 4  # a row of a descriptor is a multiple of 16 bytes
    stats = q.new_empty(2 * kv_heads, length, dtype=torch.float32)
    seen = q.new_empty(2, length, dtype=torch.int32)
    _prepare[(triton.cdiv(length, 1024), kv_heads)](
        lse.contiguous(), delta.contiguous(), packing.doc, packing.position, packing.cu_seqlens, stats, seen,
        tokens, length, HEADS=heads, GROUP=group, PADDED=padded, KERNEL=geometry.kernel_size,
        STRIDE=geometry.kernel_stride, BLOCK=1024,
    )  # fmt: skip
    dk = q.new_empty(splits, slots, kv_heads, d_qk, dtype=torch.float32)
    dv = q.new_empty(splits, slots, kv_heads, d_v, dtype=torch.float32)
    _backward_kv[(tiles * splits, kv_heads)](
        *row_descriptors(q, rows // padded, padded), *row_descriptors(do, rows // padded, padded),
        TensorDescriptor.from_tensor(stats, [1, rows]), TensorDescriptor.from_tensor(seen, [1, rows]),
        k_cmp.contiguous(), v_cmp.contiguous(), packing.doc, packing.cu_seqlens, dk, dv, slots,
        scale / math.log(2), scale, HEADS=heads, GROUP=group, D0=d0, D1=d1, E0=e0, E1=e1, KERNEL=geometry.kernel_size,
        STRIDE=geometry.kernel_stride, ROWS=rows, PADDED=padded, SLOTS=tile.slots, SPLITS=splits, **tile.options,
    )  # fmt: skip
    return dk.sum(0).to(k_cmp.dtype), dv.sum(0).to(v_cmp.dtype)
