"""Selected attention, backward for q, for Hopper in Gluon: select_dq's tiles, in the manner of select_hopper.

A step's two products, scores and dO v^T, start beside the last step's dS k, which runs under the step's arithmetic.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sieve.kernels.common.launch import multiprocessors
from sieve.kernels.nsa.compress_tiles import copyable
from sieve.kernels.nsa.runs_launch import descriptor
from sieve.kernels.nsa.select_union import BlockUnion

K_STAGES, V_STAGES = 3, 2  # k is held from a step's scores to the next step's end


@gluon.jit
def _load(
    q_desc, do_desc, k_desc, v_desc, q, do, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, count_ptr,
    tiles, total_work,
    GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, CAPACITY: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 64 // GROUP
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head = work // tiles
        count = gl.load(count_ptr + work)
        starts = start_ptr + work.to(gl.int64) * CAPACITY
        following = gl.where(count > 0, gl.load(starts), 0)
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 64 * (D + E) * 2)
        at = work % tiles * TOKENS
        tma.async_copy_global_to_shared(q_desc, [at, kv_head * GROUP, 0], q_full, q)
        tma.async_copy_global_to_shared(do_desc, [at, kv_head * GROUP, 0], q_full, do)
        turn += 1
        steps = gl.maximum(count, 1)
        for i in range(0, steps):
            first = following
            following = gl.load(starts + gl.minimum(i + 1, steps - 1))
            stage = n % K_STAGES
            mbarrier.wait(k_empty.index(stage), ((n // K_STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), 64 * D * 2)
            tma.async_copy_global_to_shared(k_desc, [first, kv_head * D], k_full.index(stage), k.index(stage))
            stage = n % V_STAGES
            mbarrier.wait(v_empty.index(stage), ((n // V_STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), 64 * E * 2)
            tma.async_copy_global_to_shared(v_desc, [first, kv_head * E], v_full.index(stage), v.index(stage))
            n += 1


@gluon.jit
def _products(
    q, do, k, v, k_full, v_full, n, s_layout: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr
):  # fmt: skip
    """q k^T and dO v^T of step n, both on their way."""
    zero = gl.zeros([64, 64], gl.float32, s_layout)
    mbarrier.wait(k_full.index(n % K_STAGES), (n // K_STAGES) & 1)
    s = warpgroup_mma(q, k.index(n % K_STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(n % V_STAGES), (n // V_STAGES) & 1)
    dp = warpgroup_mma(do, v.index(n % V_STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _ds(s, dp, lse, delta, bits, slot, limit, factor, s_layout: gl.constexpr, MASKED: gl.constexpr):
    """dS of a step. `limit`: the last key a row sees. A row that did not choose the block has weights of 0."""
    p = gl.exp2(s * factor - gl.where(((bits >> slot) & 1) != 0, lse, float("inf"))[:, None])
    if MASKED:
        key = gl.arange(0, 64, gl.SliceLayout(0, s_layout))
        p = gl.where(key[None, :] <= limit[:, None], p, 0.0)
    return p * (dp - delta[:, None])


@gluon.jit
def _sweep(
    acc, ds, n, begin, end, steps, starts, members, slot, token, lse, delta, factor, q, do, k, v,
    k_full, k_empty, v_full, v_empty,
    s_layout: gl.constexpr, o_layout: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps [begin, end) of the tile's `steps`, each with the product of the dS before it."""
    bits = gl.load(members + gl.minimum(begin, steps - 1))
    start = gl.load(starts + gl.minimum(begin, steps - 1))
    for i in range(begin, end):
        s, dp = _products(q, do, k, v, k_full, v_full, n, s_layout, K_STAGES, V_STAGES)
        last = (n - 1) % K_STAGES
        sums = warpgroup_mma(ds, k.index(last), acc, is_async=True)
        following = gl.minimum(i + 1, steps - 1)
        next_bits = gl.load(members + following)
        next_start = gl.load(starts + following)
        s, dp = warpgroup_mma_wait(1, deps=[s, dp])
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(n % V_STAGES), count=1)
        weights = _ds(s, dp, lse, delta, bits, slot, token - start, factor, s_layout, MASKED)
        # This wait ends a block of code, and so the compiler leaves the arithmetic above the wait for the product.
        mbarrier.wait(k_full.index((n + 1) % K_STAGES), ((n + 1) // K_STAGES) & 1, pred=i + 1 < steps)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])  # the weights too, so that they are computed before
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(last), count=1)
        ds = gl.convert_layout(weights.to(k.dtype), gl.DotOperandLayout(0, o_layout, 2))
        bits = next_bits
        start = next_start
        n += 1
    return acc, ds, n


@gluon.jit
def _compute(
    q, do, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, members_ptr, count_ptr, tiles, total_work,
    num_tokens, factor, scale, lse_ptr, delta_ptr, dq_ptr,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr, CAPACITY: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 64 // GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    tail: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q = q.reshape([64, D])
    do = do.reshape([64, E])
    row = gl.arange(0, 64, rows)
    slot = row // GROUP
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head = work // tiles
        first_row = work % tiles * TOKENS
        count = gl.load(count_ptr + work)
        steps = gl.maximum(count, 1)
        starts = start_ptr + work.to(gl.int64) * CAPACITY
        members = members_ptr + work.to(gl.int64) * CAPACITY
        # Blocks ascend: those that hold the tile's own tokens, which do not see all of their keys, are the last.
        at = count - 1 - gl.arange(0, 128, tail)
        ends = gl.load(starts + gl.maximum(at, 0), mask=at >= 0, other=0) + BLOCK
        own = gl.sum(((at >= 0) & (ends > first_row)).to(gl.int32), 0)
        token = first_row + slot
        at_row = gl.minimum(token, num_tokens - 1).to(gl.int64) * HEADS + kv_head * GROUP + row % GROUP
        lse = gl.load(lse_ptr + at_row) * 1.4426950408889634
        delta = gl.load(delta_ptr + at_row)

        bits = gl.where(count > 0, gl.load(members), 0)
        start = gl.where(count > 0, gl.load(starts), 0)
        mbarrier.wait(q_full, turn & 1)
        acc = gl.zeros([64, D], gl.float32, o_layout)
        s, dp = _products(q, do, k, v, k_full, v_full, n, s_layout, K_STAGES, V_STAGES)
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(n % V_STAGES), count=1)
        weights = _ds(s, dp, lse, delta, bits, slot, token - start, factor, s_layout, True)
        ds = gl.convert_layout(weights.to(k.dtype), gl.DotOperandLayout(0, o_layout, 2))
        n += 1
        whole = gl.maximum(count - own, 1)
        acc, ds, n = _sweep(
            acc, ds, n, 1, whole, steps, starts, members, slot, token, lse, delta, factor, q, do, k, v,
            k_full, k_empty, v_full, v_empty, s_layout, o_layout, K_STAGES, V_STAGES, False,
        )  # fmt: skip
        acc, ds, n = _sweep(
            acc, ds, n, whole, steps, steps, starts, members, slot, token, lse, delta, factor, q, do, k, v,
            k_full, k_empty, v_full, v_empty, s_layout, o_layout, K_STAGES, V_STAGES, True,
        )  # fmt: skip
        tl.debug_barrier()
        mbarrier.arrive(q_empty, count=1)
        turn += 1
        last = (n - 1) % K_STAGES
        dq = warpgroup_mma(ds, k.index(last), acc, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(last), count=1)

        stored = gl.arange(0, 64, gl.SliceLayout(1, o_layout))
        token = first_row + stored // GROUP
        at = (token.to(gl.int64) * HEADS + kv_head * GROUP + stored % GROUP) * D
        at = at[:, None] + gl.arange(0, D, gl.SliceLayout(0, o_layout))[None, :]
        inside = (token < num_tokens)[:, None]
        dq = dq * scale
        if ADD:
            dq += gl.load(dq_ptr + at, mask=inside, other=0.0).to(gl.float32)
        gl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["tiles", "total_work", "num_tokens"])
def _backward_q(
    q_desc, do_desc, k_desc, v_desc, start_ptr, members_ptr, count_ptr, lse_ptr, delta_ptr, dq_ptr, tiles, total_work,
    num_tokens, factor, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr, CAPACITY: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    q = gl.allocate_shared_memory(q_desc.dtype, [64 // GROUP, GROUP, D], q_desc.layout)
    do = gl.allocate_shared_memory(do_desc.dtype, [64 // GROUP, GROUP, E], do_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [K_STAGES, 64, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [V_STAGES, 64, E], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    fence_async_shared()
    tl.debug_barrier()
    gl.warp_specialize(
        [
            (_compute, (
                q, do, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, members_ptr, count_ptr, tiles,
                total_work, num_tokens, factor, scale, lse_ptr, delta_ptr, dq_ptr,
                HEADS, GROUP, D, E, BLOCK, CAPACITY, K_STAGES, V_STAGES, ADD,
            )),
            (_load, (
                q_desc, do_desc, k_desc, v_desc, q, do, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                start_ptr, count_ptr, tiles, total_work, GROUP, D, E, CAPACITY, K_STAGES, V_STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def union_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, union: BlockUnion, block_size: int, lse: Tensor, delta: Tensor, dq: Tensor,
    *, scale: float, add: bool,
) -> None:
    """What selected_dq leaves in dq [T, H, Dqk], contiguous, where select_hopper.serves says so; `union` is of 64 / group
    tokens a tile; lse, delta fp32 [T, H] contiguous."""
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k.shape[1], v.shape[2]
    group = heads // kv_heads
    q, do = copyable(q), copyable(do)
    k, v = copyable(k.contiguous()).flatten(1), copyable(v.contiguous()).flatten(1)
    work = union.tiles * kv_heads
    _backward_q[(min(work, 2 * multiprocessors(q.device)),)](
        descriptor(q, [64 // group, group, d_qk]), descriptor(do, [64 // group, group, d_v]),
        descriptor(k, [64, d_qk]), descriptor(v, [64, d_v]), union.start, union.members, union.count, lse, delta, dq,
        union.tiles, work, tokens, scale * 1.4426950408889634, scale,
        HEADS=heads, GROUP=group, D=d_qk, E=d_v, BLOCK=block_size, CAPACITY=union.capacity,
        K_STAGES=K_STAGES, V_STAGES=V_STAGES, ADD=add, num_warps=4, maxnreg=128,
    )  # fmt: skip
