"""Attention over runs of keys, forward, for Hopper in Gluon: the compression and the window branch.

A tile is 128 rows, a row being a (token, head of the KV group) pair; it reads one run of keys, of which each row sees an
interval. One warp loads queries and keys, two warpgroups compute 64 rows each, and they do not wait for each other, so that
one's softmax runs under the other's products. Within a warpgroup, the product of the last step's weights with its v is
started beside a step's scores and runs under that step's softmax (Shah et al., FlashAttention-3, arXiv 2407.08608).
Programs stay, one a multiprocessor, and take tile after tile: the next tile's queries are loaded under this one's products.

Sums follow a query's own keys in order: what is packed beside its document does not move a bit of the compression branch.
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


@gluon.jit
def _seen_of(position, KERNEL: gl.constexpr, STRIDE: gl.constexpr):
    return gl.maximum(position + 1 + STRIDE - KERNEL, 0) // STRIDE


@gluon.jit
def tile_run(
    work, doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window,
    TOKENS: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """(kv_head, first_token, begin, whole, whole_end, end) of a piece of work: its run of keys is [begin, end), all its rows
    see [whole, whole_end), and both begin a whole number of steps from `begin`. KERNEL = 0: the window branch.

    In the compression branch a tile is at most KERNEL tokens long, so that of its documents only the first shows any slot.
    """
    tiles = (num_tokens + TOKENS - 1) // TOKENS
    kv_head = work // tiles
    first_token = (tiles - 1 - work % tiles) * TOKENS  # the longest first
    last_token = gl.minimum(first_token + TOKENS, num_tokens) - 1
    first = gl.load(position_ptr + first_token)
    last = gl.load(position_ptr + last_token)
    if KERNEL > 0:
        doc = gl.load(doc_ptr + first_token)
        start = gl.load(cu_ptr + doc)
        single = doc == gl.load(doc_ptr + last_token)
        last = gl.where(single, last, gl.load(cu_ptr + doc + 1) - start - 1)
        begin = start // STRIDE
        whole = begin
        whole_end = begin + gl.where(single, _seen_of(first, KERNEL, STRIDE) // KEYS * KEYS, 0)
        end = begin + gl.maximum(_seen_of(last, KERNEL, STRIDE), 1)  # at least one step, if all of it is hidden
    else:
        begin = first_query + first_token - gl.minimum(first, window - 1)
        last_begin = first_query + last_token - gl.minimum(last, window - 1)
        whole = begin + (last_begin - begin + KEYS - 1) // KEYS * KEYS
        whole_end = begin + (first_query + first_token + 1 - begin) // KEYS * KEYS
        end = first_query + last_token + 1
    return kv_head, first_token, begin, whole, whole_end, end


@gluon.jit
def row_interval(token, position_ptr, begin, first_query, window, KERNEL: gl.constexpr, STRIDE: gl.constexpr):
    """[row_begin, row_end), the keys that rows of these tokens see of a run that begins at `begin`."""
    position = gl.load(position_ptr + token)
    if KERNEL > 0:
        return token, begin + _seen_of(position, KERNEL, STRIDE)  # a run begins where a row's keys do
    else:
        end = first_query + token + 1
        return end - 1 - gl.minimum(position, window - 1), end


@gluon.jit
def _load(
    q_desc0, q_desc1, k_desc0, k_desc1, v_desc, q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, total_work,
    GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E0: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 128 // GROUP
    Q_BYTES: gl.constexpr = 128 * (D0 + D1) * 2
    K_BYTES: gl.constexpr = KEYS * (D0 + D1) * 2
    V_BYTES: gl.constexpr = KEYS * E0 * 2
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head, first_token, begin, whole, whole_end, end = tile_run(
            work, doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, TOKENS, KERNEL, STRIDE, KEYS
        )
        side = turn % 2
        mbarrier.wait(q_empty.index(side), ((turn // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(side), Q_BYTES)
        for half in gl.static_range(2):
            token = first_token + half * (TOKENS // 2)
            tma.async_copy_global_to_shared(
                q_desc0, [token, kv_head * GROUP, 0], q_full.index(side), q0.index(2 * side + half)
            )
            if D1 > 0:
                tma.async_copy_global_to_shared(
                    q_desc1, [token, kv_head * GROUP, D0], q_full.index(side), q1.index(2 * side + half)
                )
        turn += 1
        for first in range(begin, end, KEYS):
            stage = n % STAGES
            phase = ((n // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), K_BYTES)
            column = kv_head * (D0 + D1)
            tma.async_copy_global_to_shared(k_desc0, [first, column], k_full.index(stage), k0.index(stage))
            if D1 > 0:
                tma.async_copy_global_to_shared(k_desc1, [first, column + D0], k_full.index(stage), k1.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), V_BYTES)
            tma.async_copy_global_to_shared(v_desc, [first, kv_head * E0], v_full.index(stage), v.index(stage))
            n += 1


@gluon.jit
def _softmax(
    s, top, total, first, row_begin, row_end, factor,
    s_layout: gl.constexpr, KERNEL: gl.constexpr, KEYS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One step of the running softmax: the weights, and what earlier sums shrink by."""
    if MASKED:
        key = first + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        s = gl.where(key[None, :] < row_end[:, None], s, float("-inf"))
        if KERNEL == 0:
            s = gl.where(key[None, :] >= row_begin[:, None], s, float("-inf"))
    higher = gl.maximum(top, gl.max(s, 1) * factor)
    # A row that has seen nothing yet: any finite number here keeps its weights at 0 instead of NaN.
    shift = gl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = gl.exp2(s * factor - shift[:, None])
    shrink = gl.exp2(top - shift)
    return p, shrink, higher, total * shrink + gl.sum(p, 1)


@gluon.jit
def _scores(q0, q1, k0, k1, k_full, n, s_layout: gl.constexpr, D1: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    stage = n % STAGES
    mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
    zero = gl.zeros([64, KEYS], gl.float32, s_layout)
    s = warpgroup_mma(q0, k0.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _sweep(
    acc, p, top, total, n, begin, end, final, row_begin, row_end, factor,
    q0, q1, k0, k1, v, k_full, k_empty, v_full, v_empty,
    D1: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, KERNEL: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps [begin, end) of a run that ends at `final`, each with the product of the weights before it."""
    for first in range(begin, end, KEYS):
        s = _scores(q0, q1, k0, k1, k_full, n, s_layout, D1, KEYS, STAGES)
        last = (n + STAGES - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
        sums = warpgroup_mma(p, v.index(last), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        weights, shrink, top, total = _softmax(
            s, top, total, first, row_begin, row_end, factor, s_layout, KERNEL, KEYS, MASKED
        )
        # This wait ends a block of code, and so the compiler leaves the softmax above the wait for the product. It can be
        # here because the loads that it waits for need nothing that this step still holds.
        mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=first + KEYS < final)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])  # the weights too, so that they are computed before
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(last), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        n += 1
    return acc, p, top, total, n


@gluon.jit
def _finish(
    o, total, token, head, num_tokens, o_ptr, out_ptr, cmp_ptr, slc_ptr, gates_ptr, stride_gt, stride_gh,
    HEADS: gl.constexpr, E0: gl.constexpr, COMBINE: gl.constexpr, KEEP: gl.constexpr,
    o_layout: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Store a tile of outputs and, if asked, the gated sum with the other branches' outputs (equation 5)."""
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))[:, None]
    inside = (token < num_tokens)[:, None]
    column = gl.arange(0, E0, gl.SliceLayout(0, layout))
    at = ((token.to(gl.int64) * HEADS + head) * E0)[:, None] + column[None, :]
    if COMBINE:
        o = gl.convert_layout(o, layout)
        gate = gates_ptr + gl.minimum(token, num_tokens - 1).to(gl.int64) * stride_gt + head * stride_gh
        g_cmp = gl.load(gate).to(gl.float32)[:, None]
        g_slc = gl.load(gate + 1).to(gl.float32)[:, None]
        g_win = gl.load(gate + 2).to(gl.float32)[:, None]
        out = g_win * o
        out += g_cmp * gl.load(cmp_ptr + at, mask=inside, other=0.0).to(gl.float32)
        out += g_slc * gl.load(slc_ptr + at, mask=inside, other=0.0).to(gl.float32)
        gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
        o = o.to(o_ptr.dtype.element_ty)
    else:
        o = gl.convert_layout(o.to(o_ptr.dtype.element_ty), layout)
    if KEEP:
        gl.store(o_ptr + at, o, mask=inside)


@gluon.jit
def _compute(
    q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, total_work, factor, o_ptr, lse_ptr,
    out_ptr, cmp_ptr, slc_ptr, gates_ptr, stride_gt, stride_gh,
    HALF: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E0: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    COMBINE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Rows [64 * HALF, 64 * HALF + 64) of every tile."""
    TOKENS: gl.constexpr = 128 // GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E0, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E0, E0 // 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, rows)
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head, first_token, begin, whole, whole_end, end = tile_run(
            work, doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, TOKENS, KERNEL, STRIDE, KEYS
        )
        first_token += HALF * (TOKENS // 2)
        token = first_token + row // GROUP
        row_begin, row_end = row_interval(
            gl.minimum(token, num_tokens - 1), position_ptr, begin, first_query, window, KERNEL, STRIDE
        )
        side = turn % 2
        mbarrier.wait(q_full.index(side), (turn // 2) & 1)
        mine0 = q0.index(2 * side + HALF).reshape([64, D0])
        mine1 = mine0
        if D1 > 0:
            mine1 = q1.index(2 * side + HALF).reshape([64, D1])
        top = gl.full([64], float("-inf"), gl.float32, rows)
        total = gl.zeros([64], gl.float32, rows)
        acc = gl.zeros([64, E0], gl.float32, o_layout)
        s = _scores(mine0, mine1, k0, k1, k_full, n, s_layout, D1, KEYS, STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        weights, shrink, top, total = _softmax(
            s, top, total, begin, row_begin, row_end, factor, s_layout, KERNEL, KEYS, True
        )
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        n += 1
        begin += KEYS
        if KERNEL == 0:
            acc, p, top, total, n = _sweep(
                acc, p, top, total, n, begin, gl.minimum(whole, end), end, row_begin, row_end, factor, mine0, mine1, k0, k1,
                v, k_full, k_empty, v_full, v_empty, D1, s_layout, o_layout, KERNEL, KEYS, STAGES, True,
            )  # fmt: skip
            begin = gl.maximum(begin, whole)
        acc, p, top, total, n = _sweep(
            acc, p, top, total, n, begin, whole_end, end, row_begin, row_end, factor, mine0, mine1, k0, k1,
            v, k_full, k_empty, v_full, v_empty, D1, s_layout, o_layout, KERNEL, KEYS, STAGES, False,
        )  # fmt: skip
        acc, p, top, total, n = _sweep(
            acc, p, top, total, n, gl.maximum(begin, whole_end), end, end, row_begin, row_end, factor, mine0, mine1, k0, k1,
            v, k_full, k_empty, v_full, v_empty, D1, s_layout, o_layout, KERNEL, KEYS, STAGES, True,
        )  # fmt: skip
        tl.debug_barrier()
        mbarrier.arrive(q_empty.index(side), count=1)
        turn += 1
        last = (n + STAGES - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
        o = warpgroup_mma(p, v.index(last), acc, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(last), count=1)

        some = total > 0.0
        total = gl.where(some, total, 1.0)
        lse = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        gl.store(lse_ptr + token.to(gl.int64) * HEADS + kv_head * GROUP + row % GROUP, lse, mask=token < num_tokens)
        stored = gl.arange(0, 64, gl.SliceLayout(1, layout))
        _finish(
            o, total, first_token + stored // GROUP, kv_head * GROUP + stored % GROUP, num_tokens, o_ptr, out_ptr, cmp_ptr,
            slc_ptr, gates_ptr, stride_gt, stride_gh, HEADS, E0, COMBINE, KEEP, o_layout, layout,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "first_query", "window", "total_work"])
def runs_forward(
    q_desc0, q_desc1, k_desc0, k_desc1, v_desc, doc_ptr, position_ptr, cu_ptr, o_ptr, lse_ptr,
    out_ptr, cmp_ptr, slc_ptr, gates_ptr, stride_gt, stride_gh, num_tokens, first_query, window, total_work, factor,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E0: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    COMBINE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc0.dtype
    TOKENS: gl.constexpr = 128 // GROUP
    q0 = gl.allocate_shared_memory(dtype, [4, TOKENS // 2, GROUP, D0], q_desc0.layout)
    k0 = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D0], k_desc0.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, KEYS, E0], v_desc.layout)
    q1 = q0
    k1 = k0
    if D1 > 0:
        q1 = gl.allocate_shared_memory(dtype, [4, TOKENS // 2, GROUP, D1], q_desc1.layout)
        k1 = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D1], k_desc1.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    tl.debug_barrier()
    gl.warp_specialize(
        [
            (_compute, (
                q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, total_work, factor, o_ptr, lse_ptr,
                out_ptr, cmp_ptr, slc_ptr, gates_ptr, stride_gt, stride_gh,
                0, HEADS, GROUP, D0, D1, E0, KERNEL, STRIDE, KEYS, STAGES, COMBINE, KEEP,
            )),
            (_compute, (
                q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, total_work, factor, o_ptr, lse_ptr,
                out_ptr, cmp_ptr, slc_ptr, gates_ptr, stride_gt, stride_gh,
                1, HEADS, GROUP, D0, D1, E0, KERNEL, STRIDE, KEYS, STAGES, COMBINE, KEEP,
            )),
            (_load, (
                q_desc0, q_desc1, k_desc0, k_desc1, v_desc,
                q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, first_query, window, total_work,
                GROUP, D0, D1, E0, KERNEL, STRIDE, KEYS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
