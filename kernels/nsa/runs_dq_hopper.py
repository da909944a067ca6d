"""Attention over runs of keys, backward for q, for Hopper in Gluon: tiles, masks and runs as in runs_hopper.

A step's two products, scores and dO v^T, start beside the last step's dS k, which runs under the step's arithmetic.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sieve.kernels.nsa.runs_hopper import row_interval, tile_run


@gluon.jit
def _load(
    q_desc0, q_desc1, do_desc, k_desc0, k_desc1, v_desc, q0, q1, do, k0, k1, v,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    doc_ptr, position_ptr, cu_ptr, num_tokens, window, total_work,
    GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 128 // GROUP
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head, first_token, begin, whole, whole_end, end = tile_run(
            work, doc_ptr, position_ptr, cu_ptr, num_tokens, 0, window, TOKENS, KERNEL, STRIDE, KEYS
        )
        for half in gl.static_range(2):
            full = q_full.index(half)
            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
            mbarrier.expect(full, 64 * (D0 + D1 + E) * 2)
            token = first_token + half * (TOKENS // 2)
            tma.async_copy_global_to_shared(q_desc0, [token, kv_head * GROUP, 0], full, q0.index(half))
            if D1 > 0:
                tma.async_copy_global_to_shared(q_desc1, [token, kv_head * GROUP, D0], full, q1.index(half))
            tma.async_copy_global_to_shared(do_desc, [token, kv_head * GROUP, 0], full, do.index(half))
        turn += 1
        for first in range(begin, end, KEYS):
            stage = n % K_STAGES
            full = k_full.index(stage)
            mbarrier.wait(k_empty.index(stage), ((n // K_STAGES) & 1) ^ 1)
            mbarrier.expect(full, KEYS * (D0 + D1) * 2)
            column = kv_head * (D0 + D1)
            tma.async_copy_global_to_shared(k_desc0, [first, column], full, k0.index(stage))
            if D1 > 0:
                tma.async_copy_global_to_shared(k_desc1, [first, column + D0], full, k1.index(stage))
            stage = n % V_STAGES
            mbarrier.wait(v_empty.index(stage), ((n // V_STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), KEYS * E * 2)
            tma.async_copy_global_to_shared(v_desc, [first, kv_head * E], v_full.index(stage), v.index(stage))
            n += 1


@gluon.jit
def _products(
    q0, q1, do, k0, k1, v, k_full, v_full, n,
    D1: gl.constexpr, s_layout: gl.constexpr, KEYS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """q k^T and dO v^T of step n, both on their way."""
    zero = gl.zeros([64, KEYS], gl.float32, s_layout)
    mbarrier.wait(k_full.index(n % K_STAGES), (n // K_STAGES) & 1)
    s = warpgroup_mma(q0, k0.index(n % K_STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.index(n % K_STAGES).permute((1, 0)), s, is_async=True)
    mbarrier.wait(v_full.index(n % V_STAGES), (n // V_STAGES) & 1)
    dp = warpgroup_mma(do, v.index(n % V_STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _ds(
    s, dp, lse, delta, first, row_begin, row_end, factor,
    s_layout: gl.constexpr, KERNEL: gl.constexpr, KEYS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    p = gl.exp2(s * factor - lse[:, None])
    if MASKED:
        key = first + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        p = gl.where(key[None, :] < row_end[:, None], p, 0.0)
        if KERNEL == 0:
            p = gl.where(key[None, :] >= row_begin[:, None], p, 0.0)
    return p * (dp - delta[:, None])


@gluon.jit
def _sweep(
    acc0, acc1, ds, n, begin, end, final, row_begin, row_end, lse, delta, factor,
    q0, q1, do, k0, k1, v, k_full, k_empty, v_full, v_empty,
    D1: gl.constexpr, s_layout: gl.constexpr, layout: gl.constexpr, KERNEL: gl.constexpr, KEYS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps [begin, end) of a run that ends at `final`, each with the products of the dS before it."""
    for first in range(begin, end, KEYS):
        s, dp = _products(q0, q1, do, k0, k1, v, k_full, v_full, n, D1, s_layout, KEYS, K_STAGES, V_STAGES)
        last = (n - 1) % K_STAGES
        sums0 = warpgroup_mma(ds, k0.index(last), acc0, is_async=True)
        if D1 > 0:
            sums1 = warpgroup_mma(ds, k1.index(last), acc1, is_async=True)
            s, dp = warpgroup_mma_wait(2, deps=[s, dp])
        else:
            s, dp = warpgroup_mma_wait(1, deps=[s, dp])
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(n % V_STAGES), count=1)
        weights = _ds(s, dp, lse, delta, first, row_begin, row_end, factor, s_layout, KERNEL, KEYS, MASKED)
        # This wait ends a block of code, and so the compiler leaves the arithmetic above the wait for the product.
        mbarrier.wait(k_full.index((n + 1) % K_STAGES), ((n + 1) // K_STAGES) & 1, pred=first + KEYS < final)
        if D1 > 0:
            acc0, acc1, weights = warpgroup_mma_wait(0, deps=[sums0, sums1, weights])
        else:
            acc0, weights = warpgroup_mma_wait(0, deps=[sums0, weights])  # the weights too: computed before
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(last), count=1)
        ds = gl.convert_layout(weights.to(k0.dtype), layout)
        n += 1
    return acc0, acc1, ds, n


@gluon.jit
def _store(
    dq, first_token, kv_head, num_tokens, dq_ptr, stride_dt, stride_dh,
    FROM: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr, ADD: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    row = gl.arange(0, 64, gl.SliceLayout(1, o_layout))
    token = first_token + row // GROUP
    at = token.to(gl.int64) * stride_dt + (kv_head * GROUP + row % GROUP) * stride_dh
    at = at[:, None] + (FROM + gl.arange(0, D, gl.SliceLayout(0, o_layout)))[None, :]
    inside = (token < num_tokens)[:, None]
    if ADD:
        dq += gl.load(dq_ptr + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _compute(
    q0, q1, do, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    doc_ptr, position_ptr, cu_ptr, num_tokens, window, total_work, factor, scale, lse_ptr, delta_ptr, dq_ptr,
    stride_dt, stride_dh,
    HALF: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """Rows [64 * HALF, 64 * HALF + 64) of every tile."""
    TOKENS: gl.constexpr = 128 // GROUP
    D1_UP: gl.constexpr = D1 if D1 > 0 else 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    layout0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1_UP, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, layout0, 2)  # the same registers as layout1's
    q0 = q0.index(HALF).reshape([64, D0])
    do = do.index(HALF).reshape([64, E])
    if D1 > 0:
        q1 = q1.index(HALF).reshape([64, D1])
    row = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head, first_token, begin, whole, whole_end, end = tile_run(
            work, doc_ptr, position_ptr, cu_ptr, num_tokens, 0, window, TOKENS, KERNEL, STRIDE, KEYS
        )
        first_token += HALF * (TOKENS // 2)
        token = gl.minimum(first_token + row // GROUP, num_tokens - 1)
        row_begin, row_end = row_interval(token, position_ptr, begin, 0, window, KERNEL, STRIDE)
        at_row = token.to(gl.int64) * HEADS + kv_head * GROUP + row % GROUP
        lse = gl.load(lse_ptr + at_row)
        lse = gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # a row that saw nothing
        delta = gl.load(delta_ptr + at_row)
        mbarrier.wait(q_full.index(HALF), turn & 1)
        acc0 = gl.zeros([64, D0], gl.float32, layout0)
        acc1 = gl.zeros([64, D1_UP], gl.float32, layout1)
        s, dp = _products(q0, q1, do, k0, k1, v, k_full, v_full, n, D1, s_layout, KEYS, K_STAGES, V_STAGES)
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(n % V_STAGES), count=1)
        weights = _ds(s, dp, lse, delta, begin, row_begin, row_end, factor, s_layout, KERNEL, KEYS, True)
        ds = gl.convert_layout(weights.to(k0.dtype), layout)
        n += 1
        begin += KEYS
        if KERNEL == 0:
            acc0, acc1, ds, n = _sweep(
                acc0, acc1, ds, n, begin, gl.minimum(whole, end), end, row_begin, row_end, lse, delta, factor,
                q0, q1, do, k0, k1, v, k_full, k_empty, v_full, v_empty,
                D1, s_layout, layout, KERNEL, KEYS, K_STAGES, V_STAGES, True,
            )  # fmt: skip
            begin = gl.maximum(begin, whole)
        acc0, acc1, ds, n = _sweep(
            acc0, acc1, ds, n, begin, whole_end, end, row_begin, row_end, lse, delta, factor,
            q0, q1, do, k0, k1, v, k_full, k_empty, v_full, v_empty,
            D1, s_layout, layout, KERNEL, KEYS, K_STAGES, V_STAGES, False,
        )  # fmt: skip
        acc0, acc1, ds, n = _sweep(
            acc0, acc1, ds, n, gl.maximum(begin, whole_end), end, end, row_begin, row_end, lse, delta, factor,
            q0, q1, do, k0, k1, v, k_full, k_empty, v_full, v_empty,
            D1, s_layout, layout, KERNEL, KEYS, K_STAGES, V_STAGES, True,
        )  # fmt: skip
        tl.debug_barrier()
        mbarrier.arrive(q_empty.index(HALF), count=1)
        turn += 1
        last = (n - 1) % K_STAGES
        dq0 = warpgroup_mma(ds, k0.index(last), acc0, is_async=True)
        if D1 > 0:
            dq1 = warpgroup_mma(ds, k1.index(last), acc1, is_async=True)
            dq0, dq1 = warpgroup_mma_wait(0, deps=[dq0, dq1])
        else:
            dq0 = warpgroup_mma_wait(0, deps=[dq0])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(last), count=1)
        _store(dq0 * scale, first_token, kv_head, num_tokens, dq_ptr, stride_dt, stride_dh, 0, D0, GROUP, ADD, layout0)
        if D1 > 0:
            _store(dq1 * scale, first_token, kv_head, num_tokens, dq_ptr, stride_dt, stride_dh, D0, D1, GROUP, ADD, layout1)


@gluon.jit(do_not_specialize=["num_tokens", "window", "total_work"])
def runs_backward_q(
    q_desc0, q_desc1, do_desc, k_desc0, k_desc1, v_desc, doc_ptr, position_ptr, cu_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_dt, stride_dh, num_tokens, window, total_work, factor, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc0.dtype
    HALF_TOKENS: gl.constexpr = 64 // GROUP
    q0 = gl.allocate_shared_memory(dtype, [2, HALF_TOKENS, GROUP, D0], q_desc0.layout)
    do = gl.allocate_shared_memory(dtype, [2, HALF_TOKENS, GROUP, E], do_desc.layout)
    k0 = gl.allocate_shared_memory(dtype, [K_STAGES, KEYS, D0], k_desc0.layout)
    v = gl.allocate_shared_memory(dtype, [V_STAGES, KEYS, E], v_desc.layout)
    q1 = q0
    k1 = k0
    if D1 > 0:
        q1 = gl.allocate_shared_memory(dtype, [2, HALF_TOKENS, GROUP, D1], q_desc1.layout)
        k1 = gl.allocate_shared_memory(dtype, [K_STAGES, KEYS, D1], k_desc1.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    tl.debug_barrier()
    gl.warp_specialize(
        [
            (_compute, (
                q0, q1, do, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, window, total_work, factor, scale, lse_ptr, delta_ptr, dq_ptr,
                stride_dt, stride_dh, 0, HEADS, GROUP, D0, D1, E, KERNEL, STRIDE, KEYS, K_STAGES, V_STAGES, ADD,
            )),
            (_compute, (
                q0, q1, do, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, window, total_work, factor, scale, lse_ptr, delta_ptr, dq_ptr,
                stride_dt, stride_dh, 1, HEADS, GROUP, D0, D1, E, KERNEL, STRIDE, KEYS, K_STAGES, V_STAGES, ADD,
            )),
            (_load, (
                q_desc0, q_desc1, do_desc, k_desc0, k_desc1, v_desc, q0, q1, do, k0, k1, v,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, window, total_work,
                GROUP, D0, D1, E, KERNEL, STRIDE, KEYS, K_STAGES, V_STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
