"""A step's choice of blocks, made as training's kernels make it and equal to theirs to the last bit.

Not from the scores that other launches left, but from the compressed keys, by tiles of training's sizes and training's own
device functions; the Gluon kernel, where it serves, adds its sums in the same order. One program does it all, with four
warps, as training's programs have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sieve.kernels.common.split_keys import load_query
from sieve.kernels.nsa.compress_fwd import natural_lse, softmax_step
from sieve.kernels.nsa.compress_tiles import exponent, seen_of
from sieve.kernels.nsa.scores_topk import place_of, store_importances
from sieve.kernels.nsa.topk_rows import pick_blocks


@triton.jit
def _lse(
    q_ptr, k_ptr, lse_ptr, first_head, seen, stride_n, factor,
    GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store natural lse of the group's heads, [GROUP], as compressed_attention_fwd has it."""
    row = tl.arange(0, ROWS)
    q0, q1 = load_query(q_ptr, first_head, GROUP, D0, D1, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, seen, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        visible = slot < seen
        at = k_ptr + (slot.to(tl.int64) * stride_n)[:, None]
        k0 = tl.load(at + tl.arange(0, D0)[None, :], mask=visible[:, None], other=0.0)
        s = tl.dot(q0, k0.T, input_precision="ieee")
        if D1 > 0:
            k1 = tl.load(at + D0 + tl.arange(0, D1)[None, :], mask=visible[:, None], other=0.0)
            s = tl.dot(q1, k1.T, s, input_precision="ieee")
        s = tl.where(visible[None, :], s, float("-inf"))
        _, _, top, total = softmax_step(s, top, total, factor, True)
    tl.store(lse_ptr + row, natural_lse(top, total), mask=row < GROUP)


@triton.jit
def choose_as_training(
    q_ptr, k_ptr, scratch_ptr, out_ptr, first_head, at, slots, stride_n, width, factor,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr,
    LOG_WIDTH: tl.constexpr, LOG_CHUNK: tl.constexpr, A_PADDED: tl.constexpr, LSE_ROWS: tl.constexpr,
    LSE_SLOTS: tl.constexpr, COLUMNS: tl.constexpr, SCORE_SLOTS: tl.constexpr,
):  # fmt: skip
    """Write the TOPK blocks of the query at `at`, which has more to choose from, to out_ptr, and wait until all have.

    q_ptr: its heads from first_head on. k_ptr: its KV head's compressed keys. scratch_ptr: fp32 [2 * width + GROUP], the
    program's own. A tile of scores holds the query alone, as often as it has room for.
    """
    A: tl.constexpr = BLOCK // STRIDE
    TOKENS: tl.constexpr = COLUMNS // PADDED
    seen = seen_of(at, KERNEL, STRIDE)
    own_ptr = scratch_ptr
    next_ptr = scratch_ptr + width
    lse_ptr = scratch_ptr + 2 * width
    _lse(q_ptr, k_ptr, lse_ptr, first_head, seen, stride_n, factor, GROUP, D0, D1, LSE_ROWS, LSE_SLOTS)
    tl.debug_barrier()  # what one thread wrote to the scratch memory others read
    ABREAST: tl.constexpr = min(TOKENS, 4)
    RUN: tl.constexpr = min(8 // ABREAST, PADDED)
    _, head = place_of(tl.arange(0, COLUMNS), PADDED, ABREAST, RUN)
    ok = head < GROUP
    head = tl.minimum(head, GROUP - 1)
    q_at = q_ptr + ((first_head + head).to(tl.int64) * (D0 + D1))[:, None]
    q0 = tl.load(q_at + tl.arange(0, D0)[None, :])
    q1 = q0
    if D1 > 0:
        q1 = tl.load(q_at + D0 + tl.arange(0, D1)[None, :])
    lse = exponent(tl.load(lse_ptr + head, mask=ok, other=float("inf")))
    store_importances(
        q0, q1, q_ptr, q_ptr, k_ptr, stride_n, own_ptr, next_ptr, lse, seen + tl.zeros([COLUMNS], tl.int32),
        tl.arange(0, TOKENS) == 0, 0, 0, slots, 0, tl.cdiv(seen, A), width, factor,
        D0, D1, TOKENS, PADDED, ABREAST, RUN, A, A_PADDED, KERNEL // STRIDE, SCORE_SLOTS, True, False,
    )  # fmt: skip
    tl.debug_barrier()
    one = tl.zeros([1], tl.int32)
    pick_blocks(
        own_ptr + one, next_ptr + one, out_ptr + one, at // BLOCK + one, seen + one, one == 0,
        1, A, KERNEL > STRIDE, INIT, LOCAL, TOPK, LOG_WIDTH, LOG_CHUNK,
    )  # fmt: skip
    tl.debug_barrier()
