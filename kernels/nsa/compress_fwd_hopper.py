"""Compression attention, forward, for Hopper in Gluon: one warp loads, two warpgroups compute, and softmax costs no time.

In the plain Triton kernel a tile's scores are waited for before anything else is started, so the tensor cores idle during
softmax. Here the product of the last tile's weights with its v is started beside a tile's scores, and runs under that
tile's softmax. Programs stay, one a multiprocessor, and take tile after tile: the next tile's queries are loaded
under this one's last products.

Same result as `compress_fwd` up to rounding. The order of sums is a query's own here too: documents beside its own do not
move a bit of it.
"""

from __future__ import annotations

import math

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.nsa.compress_tiles import copyable, multiprocessors
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing


@gluon.jit
def _seen_of(position, KERNEL: gl.constexpr, STRIDE: gl.constexpr):
    return gl.maximum(position + 1 + STRIDE - KERNEL, 0) // STRIDE


@gluon.jit
def _tile(
    work, doc_ptr, position_ptr, cu_ptr, num_tokens,
    TOKENS: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """(kv_head, first_token, begin, whole, end) of a piece of work: slots [begin, whole) are seen by all its rows."""
    tiles = (num_tokens + TOKENS - 1) // TOKENS
    kv_head = work // tiles
    first_token = (tiles - 1 - work % tiles) * TOKENS  # the longest first
    last_token = gl.minimum(first_token + TOKENS, num_tokens) - 1
    doc = gl.load(doc_ptr + first_token)
    last_doc = gl.load(doc_ptr + last_token)
    start = gl.load(cu_ptr + doc)
    length = gl.load(cu_ptr + doc + 1) - start
    first = gl.load(position_ptr + first_token)
    single = doc == last_doc
    last = gl.where(single, gl.load(position_ptr + last_token), length - 1)
    begin = start // STRIDE
    whole = gl.where(single, _seen_of(first, KERNEL, STRIDE) // SLOTS * SLOTS, 0)
    # At least one tile, if all of it is masked.
    return kv_head, first_token, begin, begin + whole, begin + gl.maximum(_seen_of(last, KERNEL, STRIDE), 1)


@gluon.jit
def _load(
    q_desc0, q_desc1, k_desc0, k_desc1, v_desc, q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    doc_ptr, position_ptr, cu_ptr, num_tokens, total_work, factor, o_ptr, lse_ptr,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E0: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 128 // GROUP
    Q_BYTES: gl.constexpr = 128 * (D0 + D1) * 2
    K_BYTES: gl.constexpr = SLOTS * (D0 + D1) * 2
    V_BYTES: gl.constexpr = SLOTS * E0 * 2
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head, first_token, begin, whole, end = _tile(
            work, doc_ptr, position_ptr, cu_ptr, num_tokens, TOKENS, KERNEL, STRIDE, SLOTS
        )
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, Q_BYTES)
        tma.async_copy_global_to_shared(q_desc0, [first_token, kv_head * GROUP, 0], q_full, q0)
        if D1 > 0:
            tma.async_copy_global_to_shared(q_desc1, [first_token, kv_head * GROUP, D0], q_full, q1)
        turn += 1
        for first in range(begin, end, SLOTS):
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
def _softmax(s, top, total, first, row_end, factor, s_layout: gl.constexpr, SLOTS: gl.constexpr, MASKED: gl.constexpr):
    """One step of the running softmax: the weights, and what earlier sums shrink by."""
    if MASKED:
        slot = first + gl.arange(0, SLOTS, gl.SliceLayout(0, s_layout))
        s = gl.where(slot[None, :] < row_end[:, None], s, float("-inf"))
    higher = gl.maximum(top, gl.max(s, 1) * factor)
    shift = gl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = gl.exp2(s * factor - shift[:, None])
    shrink = gl.exp2(top - shift)
    return p, shrink, higher, total * shrink + gl.sum(p, 1)


@gluon.jit
def _scores(q0, q1, k0, k1, k_full, n, s_layout: gl.constexpr, D1: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr):
    stage = n % STAGES
    mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
    zero = gl.zeros([128, SLOTS], gl.float32, s_layout)
    s = warpgroup_mma(q0, k0.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _sweep(
    acc, p, top, total, n, begin, end, final, row_end, factor, q0, q1, k0, k1, v, k_full, k_empty, v_full, v_empty,
    D1: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """A tile's scores and the product of the weights before it with their v run together, and the latter under softmax."""
    for first in range(begin, end, SLOTS):
        s = _scores(q0, q1, k0, k1, k_full, n, s_layout, D1, SLOTS, STAGES)
        last = (n + STAGES - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
        sums = warpgroup_mma(p, v.index(last), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        weights, shrink, top, total = _softmax(s, top, total, first, row_end, factor, s_layout, SLOTS, MASKED)
        # This wait ends a block of code, and so the compiler leaves the softmax above the wait for the product. It can be
        # here because the loads that it waits for need nothing that this step still holds.
        mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=first + SLOTS < final)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])  # the weights too, so that they are computed before
        tl.debug_barrier()
        mbarrier.arrive(v_empty.index(last), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        n += 1
    return acc, p, top, total, n


@gluon.jit
def _compute(
    q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    doc_ptr, position_ptr, cu_ptr, num_tokens, total_work, factor, o_ptr, lse_ptr,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E0: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 128 // GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SLOTS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, E0, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E0, E0 // 8], [8, 1], [1, 0])
    q0 = q0.reshape([128, D0])
    if D1 > 0:
        q1 = q1.reshape([128, D1])
    n = 0
    turn = 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        kv_head, first_token, begin, whole, end = _tile(
            work, doc_ptr, position_ptr, cu_ptr, num_tokens, TOKENS, KERNEL, STRIDE, SLOTS
        )
        row = gl.arange(0, 128, rows)
        token = gl.minimum(first_token + row // GROUP, num_tokens - 1)
        seen = _seen_of(gl.load(position_ptr + token), KERNEL, STRIDE)
        # Of the tile's documents only the first shows any slot: the others begin less than KERNEL tokens earlier.
        row_end = begin + seen
        mbarrier.wait(q_full, turn & 1)
        top = gl.full([128], float("-inf"), gl.float32, rows)
        total = gl.zeros([128], gl.float32, rows)
        acc = gl.zeros([128, E0], gl.float32, o_layout)
        s = _scores(q0, q1, k0, k1, k_full, n, s_layout, D1, SLOTS, STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        tl.debug_barrier()
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        weights, shrink, top, total = _softmax(s, top, total, begin, row_end, factor, s_layout, SLOTS, True)
        p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        n += 1
        acc, p, top, total, n = _sweep(
            acc, p, top, total, n, begin + SLOTS, whole, end, row_end, factor, q0, q1, k0, k1, v, k_full, k_empty,
            v_full, v_empty, D1, s_layout, o_layout, SLOTS, STAGES, False,
        )  # fmt: skip
        acc, p, top, total, n = _sweep(
            acc, p, top, total, n, gl.maximum(whole, begin + SLOTS), end, end, row_end, factor, q0, q1, k0, k1, v, k_full,
            k_empty, v_full, v_empty, D1, s_layout, o_layout, SLOTS, STAGES, True,
        )  # fmt: skip
        tl.debug_barrier()
        mbarrier.arrive(q_empty, count=1)
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
        head = kv_head * GROUP + row % GROUP
        gl.store(lse_ptr + token.to(gl.int64) * HEADS + head, lse, mask=first_token + row // GROUP < num_tokens)
        o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))[:, None]
        o = gl.convert_layout(o.to(o_ptr.dtype.element_ty), store_layout)
        row = gl.arange(0, 128, gl.SliceLayout(1, store_layout))
        column = gl.arange(0, E0, gl.SliceLayout(0, store_layout))
        token = first_token + row // GROUP
        at = (token.to(gl.int64) * HEADS + kv_head * GROUP + row % GROUP) * E0
        gl.store(o_ptr + at[:, None] + column[None, :], o, mask=(token < num_tokens)[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "total_work"])
def _forward(
    q_desc0, q_desc1, k_desc0, k_desc1, v_desc, doc_ptr, position_ptr, cu_ptr, o_ptr, lse_ptr, num_tokens, total_work,
    factor,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E0: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc0.dtype
    TOKENS: gl.constexpr = 128 // GROUP
    q0 = gl.allocate_shared_memory(dtype, [TOKENS, GROUP, D0], q_desc0.layout)
    k0 = gl.allocate_shared_memory(dtype, [STAGES, SLOTS, D0], k_desc0.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, SLOTS, E0], v_desc.layout)
    q1 = q0
    k1 = k0
    if D1 > 0:
        q1 = gl.allocate_shared_memory(dtype, [TOKENS, GROUP, D1], q_desc1.layout)
        k1 = gl.allocate_shared_memory(dtype, [STAGES, SLOTS, D1], k_desc1.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    fence_async_shared()
    tl.debug_barrier()
    gl.warp_specialize(
        [
            (_compute, (
                q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, total_work, factor, o_ptr, lse_ptr, HEADS, GROUP, D0, D1, E0,
                KERNEL, STRIDE, SLOTS, STAGES,
            )),
            (_load, (
                q_desc0, q_desc1, k_desc0, k_desc1, v_desc,
                q0, q1, k0, k1, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                doc_ptr, position_ptr, cu_ptr, num_tokens, total_work, factor, o_ptr, lse_ptr, HEADS, GROUP, D0, D1, E0,
                KERNEL, STRIDE, SLOTS, STAGES,
            )),
        ],
        [1],
        [24],
    )


def serves(q: Tensor, kv_heads: int, d_v: int, geometry: Geometry) -> bool:
    """Whether the kernel takes these shapes: 16-bit, a power of two of heads a group, d_v a power of two up to 128, and
    tiles of at most kernel_size tokens, so that a document that begins within one sees nothing there."""
    group = q.shape[1] // kv_heads
    return (
        q.element_size() == 2 and group & (group - 1) == 0 and group <= 64 and 128 // group <= geometry.kernel_size
        and d_v in (32, 64, 128) and q.shape[2] <= 192
    )  # fmt: skip


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def compressed_attention_fwd(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, packing: Packing, geometry: Geometry, *, scale: float,
    slots: int | None = None, stages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As sieve.kernels.nsa.compress_fwd.compressed_attention_fwd, where `serves` says so.

    slots: compressed blocks at a time; stages: how many of such tiles of k and v are held.
    """
    tokens, heads, d_qk = q.shape
    num_slots, kv_heads, d_v = v_cmp.shape
    (d0, d1), group = split_dim(d_qk), heads // kv_heads
    o = q.new_empty(tokens, heads, d_v)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens or not num_slots:
        return o.zero_(), lse.fill_(-math.inf)
    slots = slots or (128 if d_qk + d_v <= 256 else 64)
    stages = stages or (2 if d_qk + d_v <= 256 else 3)
    q = copyable(q)
    k = copyable(k_cmp.contiguous()).view(num_slots, -1)
    v = copyable(v_cmp.contiguous()).view(num_slots, -1)
    tile_tokens = 128 // group
    work = triton.cdiv(tokens, tile_tokens) * kv_heads
    _forward[(min(work, multiprocessors(q.device)),)](
        _descriptor(q, [tile_tokens, group, d0]), _descriptor(q, [tile_tokens, group, d1 or d0]),
        _descriptor(k, [slots, d0]), _descriptor(k, [slots, d1 or d0]), _descriptor(v, [slots, d_v]),
        packing.doc, packing.position, packing.cu_seqlens, o, lse, tokens, work, scale / math.log(2),
        HEADS=heads, GROUP=group, D0=d0, D1=d1, E0=d_v, KERNEL=geometry.kernel_size, STRIDE=geometry.kernel_stride,
        SLOTS=slots, STAGES=stages, num_warps=8,
    )  # fmt: skip
    return o, lse
