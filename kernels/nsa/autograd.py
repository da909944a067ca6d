"""The operator's forward and backward as sequences of the branches' kernels: which order, and what memory is held.

Queries are independent of each other, so where the branches' outputs need not be kept they exist for one slice of the
tokens at a time. What the backward needs of them are the three sums of o_i * dO: it has them from kept outputs (keep),
or computes the outputs again, slice by slice. Everything else it reads is of the inputs' size or smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sieve.kernels.common.ranges import named
from sieve.kernels.nsa.compress_bwd import compressed_attention_bwd
from sieve.kernels.nsa.compress_fwd import compressed_attention_fwd
from sieve.kernels.nsa.gate import combine_backward
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.scores_topk import select_blocks
from sieve.kernels.nsa.select_dkv import selected_dkv
from sieve.kernels.nsa.select_dq import selected_dq
from sieve.kernels.nsa.select_fwd import selected_attention_fwd
from sieve.kernels.nsa.window_bwd import window_dkv, window_dq
from sieve.kernels.nsa.window_fwd import window_attention_combine, window_attention_fwd

Triple = tuple[Tensor, Tensor, Tensor]  # compression, selection, window

SLICE_BYTES = 768 << 20  # of one slice's branch outputs
SLICE_TOKENS = 1024  # slices are multiples of this, so that tiles fall as without slices and results are bit-equal


def token_slices(tokens: int, bytes_per_token: int) -> list[tuple[int, int]]:
    """[first, last) of slices whose outputs take at most SLICE_BYTES."""
    step = max(SLICE_BYTES // bytes_per_token // SLICE_TOKENS, 1) * SLICE_TOKENS
    return [(first, min(first + step, tokens)) for first in range(0, max(tokens, 1), step)]


def rows(packing: Packing, at: slice) -> Packing:
    """The packing of some of the queries, among all of the row's keys."""
    return Packing(packing.cu_seqlens, packing.doc[at], packing.position[at], packing.max_seqlen)


def forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Triple, Triple | None]:
    """out [T, H, Dv], indices int32 [T, Hkv, topk], the branches' lse fp32 [T, H], and their outputs if `keep`.

    Arguments as sieve.kernels.nsa.api.nsa_attention's.
    """
    (tokens, heads, _), d_v = q.shape, v_slc.shape[2]
    out = q.new_empty(tokens, heads, d_v)
    small, outputs = [], None
    for first, last in [(0, tokens)] if keep else token_slices(tokens, 3 * heads * d_v * q.element_size()):
        at = slice(first, last)
        found = attend(
            q[at], k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates[at], out[at], rows(packing, at), packing, geometry,
            scale=scale, keep=keep, first_token=first, first_of_window=first,
        )
        small.append((found.indices, *found.lse))
        outputs = found.outputs
    indices, *lse = small[0] if len(small) == 1 else (torch.cat(parts) for parts in zip(*small))
    return out, indices, tuple(lse), outputs


class Attended(NamedTuple):
    """indices int32 [n, Hkv, topk]; the branches' lse fp32 [n, H], and their outputs [n, H, Dv] if they are kept."""

    indices: Tensor
    lse: Triple
    outputs: Triple | None


def attend(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    out: Tensor, queries: Packing, windows: Packing, geometry: Geometry, *, scale: float, keep: bool, first_token: int,
    first_of_window: int,
) -> Attended:
    """Writes out [n, H, Dv] of some of a row's queries, q [n, H, Dqk] and gates [n, H, 3].

    queries: where they are among the row's documents. first_token: the place of the first of them in k_slc and v_slc,
    first_of_window: in k_win and v_win, of whose tokens `windows` tells the positions.
    """
    with named("compression, forward"):
        o_cmp, lse_cmp = compressed_attention_fwd(q, k_cmp, v_cmp, queries, geometry, scale=scale)
    with named("scores and top-n, forward"):
        indices = select_blocks(q, k_cmp, lse_cmp, queries, geometry, scale=scale)
    with named("selection, forward"):
        o_slc, lse_slc = selected_attention_fwd(
            q, k_slc, v_slc, indices, queries, geometry, scale=scale, first_token=first_token
        )
    with named("window, forward"):
        o_win, lse_win = torch.empty_like(o_cmp) if keep else None, torch.empty_like(lse_cmp)
        window_attention_combine(
            q, k_win, v_win, windows, geometry.window_size, o_cmp, o_slc, gates, out, o_win, lse_win,
            scale=scale, first_token=first_of_window,
        )
    return Attended(indices, (lse_cmp, lse_slc, lse_win), (o_cmp, o_slc, o_win) if keep else None)


def _gates_backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, indices: Tensor, lse: Triple, outputs: Triple | None, packing: Packing, geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates' gradients [T, H, 3], and deltas and shifted lse [3, T, H] of `combine_backward`."""
    (tokens, heads, _), d_v = q.shape, v_slc.shape[2]
    # zeros, not empty: autograd's thread has no current device context until something has been launched from it, and the
    # tensor maps of the kernels below need one.
    dgates = torch.zeros(gates.shape, dtype=gates.dtype, device=gates.device)
    deltas, shifted = q.new_empty(2, 3, tokens, heads, dtype=torch.float32)
    for first, last in [(0, tokens)] if outputs else token_slices(tokens, 3 * heads * d_v * q.element_size()):
        at = slice(first, last)
        part = outputs
        if part is None:
            here = rows(packing, at)
            o_cmp, _ = compressed_attention_fwd(q[at], k_cmp, v_cmp, here, geometry, scale=scale)
            o_slc, _ = selected_attention_fwd(
                q[at], k_slc, v_slc, indices[at], here, geometry, scale=scale, first_token=first
            )
            o_win, _ = window_attention_fwd(
                q[at], k_win, v_win, packing, geometry.window_size, scale=scale, first_token=first
            )
            part = (o_cmp, o_slc, o_win)
        combine_backward(
            do[at], part, gates[at], tuple(x[at] for x in lse), dgates[at],
            tuple(x[at] for x in deltas), tuple(x[at] for x in shifted),
        )
    return dgates, deltas, shifted


def backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, indices: Tensor, lse: Triple, outputs: Triple | None, packing: Packing, geometry: Geometry, *,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win and gates, in their shapes and dtypes.

    indices, lse and outputs are what `forward` returned; outputs is None where they were not kept.
    """
    with named("gates, backward"):
        dgates, deltas, shifted = _gates_backward(
            do, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, indices, lse, outputs, packing, geometry, scale
        )
    w = geometry.window_size
    # dq is summed in place, branch by branch: in fp32 within a kernel, rounded to q's dtype between two.
    with named("window, backward"):
        dq = window_dq(do, q, k_win, v_win, shifted[2], deltas[2], packing, w, scale=scale)
        dk_win, dv_win = window_dkv(do, q, k_win, v_win, shifted[2], deltas[2], packing, w, scale=scale)
    with named("selection, backward"):
        selected = do, q, k_slc, v_slc, indices, shifted[1], deltas[1], packing, geometry
        selected_dq(*selected, scale=scale, dq=dq)
        dk_slc, dv_slc = selected_dkv(*selected, scale=scale)
    with named("compression, backward"):
        dk_cmp, dv_cmp = compressed_attention_bwd(
            do, q, k_cmp, v_cmp, shifted[0], deltas[0], packing, geometry, scale=scale, dq=dq
        )
    return dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates
