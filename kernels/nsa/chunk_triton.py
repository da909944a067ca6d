"""Native Sparse Attention of several new tokens of a sequence over its cache: training's own kernels.

For a kernel the new tokens are some of a row's queries, as the slices are that training without kept outputs works in. So the
chosen blocks are training's to the last bit, given the same queries and compressed keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.nsa.autograd import attend, rows, token_slices
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing


def attend_run(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    past: int, geometry: Geometry, *, scale: float,
) -> tuple[Tensor, Tensor]:
    """What nsa_attention gives the n tokens after the first `past` of a sequence: out [n, H, Dv], int32 [n, Hkv, topk].

    q [n, H, Dqk], rotated; gates [n, H, 3]. k_cmp [Hkv, C, Dqk], v_cmp [Hkv, C, Dv]: compressed block i in place i.
    k_slc [Hkv, S, Dqk], v_slc [Hkv, S, Dv]: the token at position p in place p, the new ones' included. k_win [m + n, Hkv,
    Dqk], v_win [m + n, Hkv, Dv]: of the m = min(past, window_size - 1) tokens before the new ones, and of those. No gradient.
    """
    (n, heads, _), d_v, device = q.shape, v_slc.shape[2], q.device
    total, before = past + n, len(k_win) - n
    if before != min(past, geometry.window_size - 1):
        raise ValueError(f"k_win has {before} tokens before the {n} new ones, not min({past}, {geometry.window_size} - 1)")
    k_cmp, v_cmp = (x.transpose(0, 1)[: total // geometry.kernel_stride].contiguous() for x in (k_cmp, v_cmp))
    k_slc, v_slc = (x.transpose(0, 1)[:total].contiguous() for x in (k_slc, v_slc))
    queries, windows = _stretch(past, total, total, device), _stretch(past - before, total, len(k_win), device)
    out, indices = q.new_empty(n, heads, d_v), []
    for first, last in token_slices(n, 3 * heads * d_v * q.element_size()):
        at = slice(first, last)
        found = attend(
            q[at], k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates[at], out[at], rows(queries, at), windows, geometry,
            scale=scale, keep=False, first_token=past + first, first_of_window=before + first,
        )
        indices.append(found.indices)
    return out, torch.cat(indices)


def _stretch(first: int, last: int, row: int, device: torch.device) -> Packing:
    """The tokens at positions [first, last) of a document, the only one in a row of `row` tokens."""
    position = torch.arange(first, last, dtype=torch.int32, device=device)
    return Packing(torch.arange(2, dtype=torch.int32, device=device) * row, torch.zeros_like(position), position, last)
