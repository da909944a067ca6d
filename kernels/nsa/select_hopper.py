"""Selected attention, forward, for Hopper in Gluon: select_fwd's tiles over the union of their blocks.

One warp loads queries and blocks, one warpgroup computes 64 rows, two programs share a multiprocessor and do not wait for
each other. A step's scores start beside the product of the last step's weights, which runs under the softmax. A block is
hidden whole from the rows that did not choose it, by their exponent; only the tile's own blocks are masked key by key.
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
from sieve.kernels.nsa.runs_launch import descriptor, fits, hopper
from sieve.kernels.nsa.select_union import BlockUnion

K_STAGES, V_STAGES = 3, 2


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, count_ptr, tiles, total_work,
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
        mbarrier.expect(q_full, 64 * D * 2)
        tma.async_copy_global_to_shared(q_desc, [work % tiles * TOKENS, kv_head * GROUP, 0], q_full, q)
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
def _softmax(s, top, total, bits, slot, limit, factor, s_layout: gl.constexpr, MASKED: gl.constexpr):
    """One step of the running softmax: the weights, and what earlier sums shrink by. `limit`: the last key a row sees."""
    chosen = ((bits >> slot) & 1) != 0
    if MASKED:
        key = gl.arange(0, 64, gl.SliceLayout(0, s_layout))
        s = gl.where(key[None, :] <= limit[:, None], s, float("-inf"))
    higher = gl.maximum(top, gl.where(chosen, gl.max(s, 1) * factor, float("-inf")))
    # A row that has seen nothing yet: any finite number here keeps its weights at 0 instead of NaN.
    shift = gl.where(higher == float("-inf"), 0.0, higher)
    p = gl.exp2(s * factor - gl.where(chosen, shift, float("inf"))[:, None])
    shrink = gl.exp2(top - shift)
    return p, shrink, higher, total * shrink + gl.sum(p, 1)


@gluon.jit
def _scores(q, k, k_full, n, s_layout: gl.constexpr, K_STAGES: gl.constexpr):
    stage = n % K_STAGES
    mbarrier.wait(k_full.index(stage), (n // K_STAGES) & 1)
    zero = gl.zeros([64, 64], gl.float32, s_layout)
    return warpgroup_mma(q, k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _sweep(
    acc, p, top, total, n, begin, end, steps, starts, members, slot, token, factor, q, k, v, k_full, k_empty, v_full, v_empty,
    s_layout: gl.constexpr, o_layout: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps [begin, end) of the tile's `steps`, each with the product of the weights before it."""
    bits = gl.load(members + gl.minimum(begin, steps - 1))
    start = gl.load(starts + gl.minimum(begin, steps - 1))
    for i in range(begin, end):
        s = _scores(q, k, k_full, n, s_layout, K_STAGES)
        last = (n - 1) % V_STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // V_STAGES) & 1)
        sums = warpgroup_mma(p, v.index(last), acc, is_async=True)
        following = gl.minimum(i + 1, steps - 1)
        next_bits = gl.load(members + following)
        next_start = gl.load(starts + following)
        s = warpgroup_mma_wait(1, deps=[s])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(n % K_STAGES), count=1)
        weights, shrink, top, total = _softmax(s, top, total, bits, slot, token - start, factor, s_layout, MASKED)
        # This wait ends a block of code, and so the compiler leaves the softmax above the wait for the product.
        mbarrier.wait(k_full.index((n + 1) % K_STAGES), ((n + 1) // K_STAGES) & 1, pred=i + 1 < steps)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])  # the weights too, so that they are computed before
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(last), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        bits = next_bits
        start = next_start
        n += 1
    return acc, p, top, total, n


@gluon.jit
def _compute(
    q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, members_ptr, count_ptr, tiles, total_work,
    num_tokens, first_token, factor, o_ptr, lse_ptr,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr, CAPACITY: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 64 // GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    tail: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mine = q.reshape([64, D])
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
        own = gl.sum(((at >= 0) & (ends > first_token + first_row)).to(gl.int32), 0)
        token = first_token + first_row + slot

        bits = gl.where(count > 0, gl.load(members), 0)
        start = gl.where(count > 0, gl.load(starts), 0)
        mbarrier.wait(q_full, turn & 1)
        top = gl.full([64], float("-inf"), gl.float32, rows)
        total = gl.zeros([64], gl.float32, rows)
        acc = gl.zeros([64, E], gl.float32, o_layout)
        s = _scores(mine, k, k_full, n, s_layout, K_STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(n % K_STAGES), count=1)
        weights, shrink, top, total = _softmax(s, top, total, bits, slot, token - start, factor, s_layout, True)
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        n += 1
        whole = gl.maximum(count - own, 1)
        acc, p, top, total, n = _sweep(
            acc, p, top, total, n, 1, whole, steps, starts, members, slot, token, factor, mine, k, v,
            k_full, k_empty, v_full, v_empty, s_layout, o_layout, K_STAGES, V_STAGES, False,
        )  # fmt: skip
        acc, p, top, total, n = _sweep(
            acc, p, top, total, n, whole, steps, steps, starts, members, slot, token, factor, mine, k, v,
            k_full, k_empty, v_full, v_empty, s_layout, o_layout, K_STAGES, V_STAGES, True,
        )  # fmt: skip
        tl.debug_barrier()
        mbarrier.arrive(q_empty, count=1)
        turn += 1
        last = (n - 1) % V_STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // V_STAGES) & 1)
        o = warpgroup_mma(p, v.index(last), acc, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(last), count=1)

        some = total > 0.0
        total = gl.where(some, total, 1.0)
        lse = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        head = kv_head * GROUP + row % GROUP
        gl.store(lse_ptr + (first_row + slot).to(gl.int64) * HEADS + head, lse, mask=first_row + slot < num_tokens)
        o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))[:, None]
        o = gl.convert_layout(o.to(o_ptr.dtype.element_ty), layout)
        stored = gl.arange(0, 64, gl.SliceLayout(1, layout))
        at_o = ((first_row + stored // GROUP).to(gl.int64) * HEADS + kv_head * GROUP + stored % GROUP) * E
        column = gl.arange(0, E, gl.SliceLayout(0, layout))
        gl.store(o_ptr + at_o[:, None] + column[None, :], o, mask=(first_row + stored // GROUP < num_tokens)[:, None])


@gluon.jit(do_not_specialize=["tiles", "total_work", "num_tokens", "first_token"])
def _forward(
    q_desc, k_desc, v_desc, start_ptr, members_ptr, count_ptr, o_ptr, lse_ptr, tiles, total_work, num_tokens, first_token,
    factor,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr, CAPACITY: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    q = gl.allocate_shared_memory(q_desc.dtype, [64 // GROUP, GROUP, D], q_desc.layout)
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
                q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, members_ptr, count_ptr, tiles,
                total_work, num_tokens, first_token, factor, o_ptr, lse_ptr,
                HEADS, GROUP, D, E, BLOCK, CAPACITY, K_STAGES, V_STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, count_ptr,
                tiles, total_work, GROUP, D, E, CAPACITY, K_STAGES, V_STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def fits_shapes(q: Tensor, kv_heads: int, d_v: int, block_size: int) -> bool:
    """Whether the kernel takes these shapes: those of which two programs fit on a multiprocessor."""
    return fits(q, kv_heads, d_v) and block_size == 64 and q.shape[2] in (32, 64, 128)


def serves(q: Tensor, kv_heads: int, d_v: int, block_size: int) -> bool:
    """Whether the kernel runs on q's device and takes its shapes."""
    return hopper(q.device) and fits_shapes(q, kv_heads, d_v, block_size)


def attend_union(
    q: Tensor, k: Tensor, v: Tensor, union: BlockUnion, block_size: int, o: Tensor, lse: Tensor, *, scale: float,
    first_token: int,
) -> None:
    """Writes o [n, H, Dv] and lse fp32 [n, H], contiguous; `union` is of 64 / group tokens a tile. See select_fwd."""
    (tokens, heads, d_qk), kv_heads, d_v = q.shape, k.shape[1], v.shape[2]
    group = heads // kv_heads
    q, k, v = copyable(q), copyable(k.contiguous()).flatten(1), copyable(v.contiguous()).flatten(1)
    work = union.tiles * kv_heads
    _forward[(min(work, 2 * multiprocessors(q.device)),)](
        descriptor(q, [64 // group, group, d_qk]), descriptor(k, [64, d_qk]), descriptor(v, [64, d_v]),
        union.start, union.members, union.count, o, lse, union.tiles, work, tokens, first_token, scale * 1.4426950408889634,
        HEADS=heads, GROUP=group, D=d_qk, E=d_v, BLOCK=block_size, CAPACITY=union.capacity,
        K_STAGES=K_STAGES, V_STAGES=V_STAGES, num_warps=4, maxnreg=128,
    )  # fmt: skip
