"""Native Sparse Attention of new tokens over a cache: one entry, arguments checked, implementation chosen."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal

import torch
from torch import Tensor

from sieve.kernels.common.dims import supported_dims
from sieve.kernels.common.log import log_once
from sieve.kernels.nsa import api, decode_reference
from sieve.kernels.nsa.geometry import Geometry

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")
TRITON_MODULE = "sieve.kernels.nsa.decode_triton"


def decode_kernels_missing(device: torch.device, dtype: torch.dtype, queries: int, d_qk: int, d_v: int) -> str | None:
    """The reason why the decode kernels cannot serve `queries` tokens a sequence; None when they can."""
    reason = api.why_not_triton(device, dtype)
    if reason is None and importlib.util.find_spec(TRITON_MODULE) is None:
        reason = f"{TRITON_MODULE} is not part of this installation"
    if reason is None and not {d_qk, d_v} <= set(supported_dims()):
        reason = f"they have none for head dimensions {d_qk} and {d_v}"
    if reason is None and queries > 1:
        reason = f"they take one token a sequence, not {queries}"
    return reason


def resolve_impl(
    impl: Impl, device: torch.device, dtype: torch.dtype, queries: int, d_qk: int, d_v: int
) -> Literal["triton", "reference"]:
    """Which implementation runs; "auto" logs its choice once. ValueError for "triton" where it cannot be had."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl == "reference":
        return "reference"
    if impl == "auto" and device.type != "cuda":
        reason = f"the tensors are on {device.type}"
    else:
        reason = decode_kernels_missing(device, dtype, queries, d_qk, d_v)
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl='triton' cannot be had: {reason}; use impl='reference' or 'auto'")
    why = "" if reason is None else f" (plain PyTorch), since triton cannot be had: {reason}"
    log_once(__name__, f"nsa decoding: {'triton' if reason is None else 'reference'}{why}")
    return "triton" if reason is None else "reference"


def nsa_decode(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    query: Tensor, window_key: Tensor, longest: int, geometry: Geometry, *, scale: float, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """What nsa_attention gives the last n tokens of B sequences of different lengths, their keys in caches.

    q [B, n, H, Dqk], rotated; gates [B, n, H, 3]. query: int32 [B, n], each query's position in its sequence, never
        falling along n; a place past a sequence's last new token may hold anything up to `longest`, and so do its outputs.
    k_cmp [B, Hkv, C, Dqk], v_cmp [B, Hkv, C, Dv]: compressed block i of a sequence in place i, C a multiple of 16; what
        a query does not see must be finite.
    k_slc [B, Hkv, S, Dqk], v_slc [B, Hkv, S, Dv]: the token at position p in place p.
    k_win [B, Hkv, W, Dqk], v_win [B, Hkv, W, Dv]: the window's tokens in any order, at positions window_key int32 [B, W]
        (-1: none); with n = 1, W = window_size and position p lies in place p % W.
    longest: on the host, at least every query's position + 1.
    Returns out [B, n, H, Dv] in q's dtype and int32 [B, n, Hkv, topk], as nsa_attention's: given the same queries and
        compressed keys, the blocks that training's kernels choose on the device, to the last bit. No gradient.
    Raises ValueError on shapes that do not fit together, and on an impl that cannot be had.
    """
    (B, n, H, Dqk), (_, Hkv, S, Dv) = q.shape, v_slc.shape
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"q has {H} heads {list(q.shape)}, not divisible by the {Hkv} of v_slc {list(v_slc.shape)}")
    C, W = k_cmp.shape[2], k_win.shape[2]
    wanted = {
        "k_cmp": (k_cmp, (B, Hkv, C, Dqk)), "v_cmp": (v_cmp, (B, Hkv, C, Dv)), "k_slc": (k_slc, (B, Hkv, S, Dqk)),
        "v_slc": (v_slc, (B, Hkv, S, Dv)), "k_win": (k_win, (B, Hkv, W, Dqk)), "v_win": (v_win, (B, Hkv, W, Dv)),
        "gates": (gates, (B, n, H, 3)), "query": (query, (B, n)), "window_key": (window_key, (B, W)),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside q {list(q.shape)}, got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if C % decode_reference.TILE or C < longest // geometry.kernel_stride:
        raise ValueError(f"k_cmp has {C} places; it needs a multiple of {decode_reference.TILE} for {longest} tokens")
    if S < longest:
        raise ValueError(f"k_slc has {S} places, fewer than longest={longest}")
    args = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, query, window_key, longest, geometry)
    with torch.no_grad():
        if resolve_impl(impl, q.device, q.dtype, n, Dqk, Dv) == "triton":
            return importlib.import_module(TRITON_MODULE).nsa_decode(*args, scale=scale)
        return decode_reference.nsa_decode(*args, scale=scale)
