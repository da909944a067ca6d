"""Which blocks the selected branch reads (equations 9 to 12): Triton kernel and launcher.

One sweep over the compressed slots gives the weights p_cmp anew from q, k_cmp and lse, in registers: transposed, slots
by (token, head) columns, so that the sum over a group's heads runs along registers. With a = l'/d slots a selection
block and b = l/d strides a slot, slot r of a block overlaps it in min(b, a - r) strides, equation 9's weight, and the
block after it in the rest of b. So each tile of slots yields two numbers a block and query, `own` and `next`, and no
tile needs a slot of its neighbour. They go to scratch memory of the program, which then picks the query's blocks from
it: bounded by the number of programs that run at once, not by the number of queries.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import multiprocessors, unit_stride
from sieve.kernels.nsa.compress_tiles import Tile, exponent, seen_of, slot_descriptors
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.topk_rows import pick_blocks

SCRATCH_BYTES = 512 << 20  # of all programs together
LOG_CHUNK = 7  # 128 blocks looked at together: four a lane, so that a query's row stays within a warp
MOST_TOKENS = 32  # of a tile, so that small groups do not multiply the scratch memory


def scores_tile(group: int, d_qk: int, dtype: torch.dtype) -> Tile:
    """`rows` counts the columns of the transposed scores, (token, head) pairs; heads are padded to a power of two."""
    padded = triton.next_power_of_2(group)
    columns = min(128, MOST_TOKENS * padded)
    if dtype == torch.float32:
        return Tile(max(min(columns, 32), padded), 32, 4, 1)
    # 168 registers: three programs of 4 warps a multiprocessor, which sort, take exponentials and multiply by turns.
    return Tile(max(columns, 16), 64, 4, 2, 168 if d_qk <= 128 else None)


def resident_programs(tile: Tile, d_qk: int, itemsize: int) -> int:
    """How many programs run on a multiprocessor at once, so that one wave takes all the work: by registers, and by the
    shared memory of a tile of queries, the stages of keys and what sums and sorts pass through."""
    by_registers = 65536 // (tile.num_warps * 32 * (tile.max_registers or 255))
    by_memory = (227 << 10) // ((tile.rows + tile.num_stages * tile.slots) * d_qk * itemsize + (6 << 10))
    return max(1, min(by_registers, by_memory))


def topk_row(geometry: Geometry, longest: int) -> tuple[int, int, int]:
    """(LOG_WIDTH, LOG_CHUNK) of pick_blocks, and how wide a row of scratch memory is: the blocks of a document of `longest`
    tokens, and one that `next` of the last may go to, in whole chunks."""
    log_width = (geometry.topk - 1).bit_length()
    log_chunk = max(LOG_CHUNK, log_width)
    return log_width, log_chunk, ((triton.cdiv(longest, geometry.block_size) >> log_chunk) + 1) << log_chunk


@triton.jit
def place_of(column, PADDED: tl.constexpr, ABREAST: tl.constexpr, RUN: tl.constexpr):
    """(token of the tile, head of the group) of a column: RUN heads in a row, of ABREAST tokens by turns.

    In a warpgroup's accumulator each of four neighbouring threads holds two of every eight columns. With eight columns to a
    turn, a token's heads are then in one thread (or two, or four, where a tile has few tokens), and their sum needs no
    exchange between threads.
    """
    turn = column // (ABREAST * RUN)
    turns: tl.constexpr = PADDED // RUN
    token = turn // turns * ABREAST + column // RUN % ABREAST
    return token, turn % turns * RUN + column % RUN


@triton.jit
def store_importances(
    q0, q1, k0_desc, k1_desc, k_ptr, stride_n, own_ptr, next_ptr, lse, seen, written, kv_head, doc_slot, num_slots, begin, end,
    width, factor,
    D0: tl.constexpr, D1: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, ABREAST: tl.constexpr, RUN: tl.constexpr,
    A: tl.constexpr, A_PADDED: tl.constexpr, B: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Store own and next of the blocks [begin, end) for the queries `written`; MASKED if some do not see all of them.

    Keys come through their descriptors if DESCRIBED, which takes A == A_PADDED, and from k_ptr, slots stride_n apart, if not.
    """
    BLOCKS: tl.constexpr = SLOTS // A_PADDED
    place = tl.arange(0, SLOTS) % A_PADDED
    inside = tl.arange(0, A_PADDED)
    own_weight = tl.where(inside < A, tl.minimum(A - inside, B), 0).to(tl.float32)[None, :, None]
    next_weight = tl.where(inside < A, tl.maximum(inside - A + B, 0), 0).to(tl.float32)[None, :, None]
    for first in range(begin, end, BLOCKS):
        # Within the document. Where A is no power of two, the places from A on repeat slots and weigh nothing.
        slot = (first + tl.arange(0, SLOTS) // A_PADDED) * A + place
        if DESCRIBED:
            k0 = k0_desc.load([doc_slot + first * A, kv_head * (D0 + D1)])
            if D1 > 0:
                k1 = k1_desc.load([doc_slot + first * A, kv_head * (D0 + D1) + D0])
        else:
            at = tl.minimum(doc_slot + slot, num_slots - 1).to(tl.int64) * stride_n + kv_head * (D0 + D1)
            k0 = tl.load(k_ptr + at[:, None] + tl.arange(0, D0)[None, :])
            if D1 > 0:
                k1 = tl.load(k_ptr + (at + D0)[:, None] + tl.arange(0, D1)[None, :])
        s = tl.dot(k0, q0.T, input_precision="ieee")  # [slots, columns]
        if D1 > 0:
            s = tl.dot(k1, q1.T, s, input_precision="ieee")
        p = tl.exp2(s * factor - lse[None, :])
        if MASKED:
            p = tl.where(slot[:, None] < seen[None, :], p, 0.0)
        p = tl.sum(tl.reshape(p, [SLOTS, TOKENS // ABREAST, PADDED // RUN, ABREAST, RUN]), 4)
        p = tl.reshape(tl.sum(p, 2), [BLOCKS, A_PADDED, TOKENS])
        block = first + tl.arange(0, BLOCKS)[:, None]
        at = tl.arange(0, TOKENS)[None, :] * width + block
        mask = written[None, :] & (block + 1 < width)
        own = tl.sum(p * own_weight, 1)
        if B > 1:
            # One store for both: each would pass through shared memory on its way to the scratch memory.
            both = tl.join(own, tl.sum(p * next_weight, 1))
            tl.store(tl.join(own_ptr + at, next_ptr + at + 1), both, mask=tl.join(mask, mask))
        else:
            tl.store(own_ptr + at, own, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _select(
    q_ptr, k0_desc, k1_desc, k_ptr, lse_ptr, doc_ptr, position_ptr, cu_ptr, scratch_ptr, out_ptr, stride_qt, stride_qh,
    num_tokens, num_slots, width, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_CHUNK: tl.constexpr,
    A_PADDED: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = BLOCK // STRIDE
    B: tl.constexpr = KERNEL // STRIDE
    BLOCKS: tl.constexpr = SLOTS // A_PADDED
    TOKENS: tl.constexpr = COLUMNS // PADDED
    ABREAST: tl.constexpr = min(TOKENS, 4)
    RUN: tl.constexpr = min(8 // ABREAST, PADDED)
    PICKED: tl.constexpr = min(TOKENS, 8)  # queries at a time, for their ranks to fit into registers
    HEADS_KV: tl.constexpr = HEADS // GROUP
    own_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * TOKENS) * width
    next_ptr = own_ptr + TOKENS * width
    column = tl.arange(0, COLUMNS)
    local = tl.arange(0, TOKENS)
    tiles = tl.cdiv(num_tokens, TOKENS)
    for work in range(tl.program_id(0), tiles * HEADS_KV, tl.num_programs(0)):
        kv_head = work // tiles
        first_token = (tiles - 1 - work % tiles) * TOKENS  # the longest first
        token = tl.minimum(first_token + local, num_tokens - 1)
        token_ok = first_token + local < num_tokens
        doc = tl.load(doc_ptr + token)
        position = tl.load(position_ptr + token)
        # A query with no more candidates than it may choose takes them all, whatever they weigh.
        seen = tl.where(position // BLOCK >= TOPK, seen_of(position, KERNEL, STRIDE), 0)

        column_token, head = place_of(column, PADDED, ABREAST, RUN)
        column_token += first_token
        column_ok = (column_token < num_tokens) & (head < GROUP)
        column_token = tl.minimum(column_token, num_tokens - 1)
        head = (kv_head * GROUP + tl.minimum(head, GROUP - 1)).to(tl.int64)
        q_at = q_ptr + (column_token.to(tl.int64) * stride_qt + head * stride_qh)[:, None]
        q0 = tl.load(q_at + tl.arange(0, D0)[None, :])
        q1 = q0
        if D1 > 0:
            q1 = tl.load(q_at + D0 + tl.arange(0, D1)[None, :])
        lse = exponent(tl.load(lse_ptr + column_token.to(tl.int64) * HEADS + head, mask=column_ok, other=float("inf")))
        column_doc = tl.load(doc_ptr + column_token)
        column_seen = seen_of(tl.load(position_ptr + column_token), KERNEL, STRIDE)

        first_doc = tl.min(doc, 0)
        last_doc = tl.max(doc, 0)
        for d in range(first_doc, last_doc + 1):
            doc_slot = tl.load(cu_ptr + d) // STRIDE
            mine = token_ok & (doc == d)
            last_block = tl.cdiv(tl.max(tl.where(mine, seen, 0), 0), A)
            whole = tl.min(tl.where(mine, seen, 0), 0) // (BLOCKS * A) * BLOCKS
            store_importances(
                q0, q1, k0_desc, k1_desc, k_ptr, HEADS_KV * (D0 + D1), own_ptr, next_ptr, lse, column_seen, mine, kv_head,
                doc_slot, num_slots, 0, whole, width, factor, D0, D1, TOKENS, PADDED, ABREAST, RUN,
                A, A_PADDED, B, SLOTS, False, A == A_PADDED,
            )  # fmt: skip
            store_importances(
                q0, q1, k0_desc, k1_desc, k_ptr, HEADS_KV * (D0 + D1), own_ptr, next_ptr, lse,
                tl.where(column_doc == d, column_seen, 0), mine, kv_head, doc_slot, num_slots, whole, last_block, width, factor,
                D0, D1, TOKENS, PADDED, ABREAST, RUN, A, A_PADDED, B, SLOTS, True, A == A_PADDED,
            )  # fmt: skip
        tl.debug_barrier()  # the scratch memory was written by other threads than will read it
        for part in range(0, TOKENS, PICKED):
            picked = part + tl.arange(0, PICKED)
            row = picked.to(tl.int64) * width
            picked += first_token
            picked_ok = picked < num_tokens
            picked = tl.minimum(picked, num_tokens - 1)
            at = tl.load(position_ptr + picked)
            pick_blocks(
                own_ptr + row, next_ptr + row, out_ptr + (picked.to(tl.int64) * HEADS_KV + kv_head) * TOPK, at // BLOCK,
                tl.where(at // BLOCK >= TOPK, seen_of(at, KERNEL, STRIDE), 0), picked_ok,
                PICKED, A, B > 1, INIT, LOCAL, TOPK, LOG_WIDTH, LOG_CHUNK,
            )  # fmt: skip
        tl.debug_barrier()


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, packing: Packing, geometry: Geometry, *, scale: float,
    tile: Tile | None = None, programs: int | None = None,
) -> Tensor:
    """The selection blocks each query and KV group reads.

    q [T, H, Dqk], k_cmp [C, Hkv, Dqk] in slots, lse fp32 [T, H] of compressed_attention_fwd -> int32 [T, Hkv, topk]:
    block numbers within the document, ascending, -1 past the last. Forced blocks are always among them, then the
    largest importance, ties to the lower block. scale must be positive. packing.doc and packing.position may be a run
    of the row's tokens, if q and lse are the same run. Scratch memory: at most 0.5 GB. Source: arXiv 2502.11089.
    """
    tokens, heads, d_qk = q.shape
    slots, kv_heads, _ = k_cmp.shape
    d0, d1 = split_dim(d_qk)
    out = q.new_empty(tokens, kv_heads, geometry.topk, dtype=torch.int32)
    if not tokens:
        return out
    if not slots:  # no token sees any, and some row must stand behind the descriptor
        k_cmp = q.new_zeros(1, kv_heads, d_qk)
        slots = 1
    group = heads // kv_heads
    tile = tile or scores_tile(group, d_qk, q.dtype)
    padded = triton.next_power_of_2(group)
    a_padded = triton.next_power_of_2(geometry.block_size // geometry.kernel_stride)
    columns, tile_slots = max(tile.rows, padded), max(tile.slots, a_padded)
    tile_tokens = columns // padded
    log_width, log_chunk, width = topk_row(geometry, packing.max_seqlen)
    fit = max(1, SCRATCH_BYTES // (8 * tile_tokens * width))
    work = triton.cdiv(tokens, tile_tokens) * kv_heads
    resident = resident_programs(tile, d_qk, q.element_size()) * multiprocessors(q.device)
    programs = min(programs or resident, fit, work)
    scratch = q.new_empty(programs, 2, tile_tokens, width, dtype=torch.float32)
    q, k_cmp = unit_stride(q), k_cmp.contiguous()
    _select[(programs,)](
        q, *slot_descriptors(k_cmp, tile_slots), k_cmp, lse.contiguous(), packing.doc, packing.position,
        packing.cu_seqlens, scratch, out, *q.stride()[:2], tokens, slots, width, scale / math.log(2),
        HEADS=heads, GROUP=group, PADDED=padded, D0=d0, D1=d1, KERNEL=geometry.kernel_size,
        STRIDE=geometry.kernel_stride, BLOCK=geometry.block_size, INIT=geometry.init_blocks,
        LOCAL=geometry.local_blocks, TOPK=geometry.topk, LOG_WIDTH=log_width, LOG_CHUNK=log_chunk,
        A_PADDED=a_padded, COLUMNS=columns, SLOTS=tile_slots, **tile.options,
    )  # fmt: skip
    return out
