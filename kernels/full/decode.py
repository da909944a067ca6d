"""Attention of new tokens over cached keys, full or windowed, each sequence of the batch at a length of its own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sieve.kernels.common import availability
from sieve.kernels.common.dense import attend, compute_dtype
from sieve.kernels.common.dims import supported_dims
from sieve.kernels.full.sdpa import attend_fused, one_head_size

Impl = Literal["auto", "triton", "sdpa", "reference"]
IMPLS = ("auto", "triton", "sdpa", "reference")
CHUNK = 128  # queries whose scores, or mask, are held at once


def why_not_triton(device: torch.device, dtype: torch.dtype, queries: int, d_qk: int, d_v: int) -> str | None:
    """The reason why the Triton kernel cannot serve `queries` tokens a sequence; None when it can."""
    reason = availability.why_not_triton(device, dtype)
    if reason is None and queries != 1:
        reason = f"it takes one token a sequence, not {queries}"
    if reason is None and not {d_qk, d_v} <= set(supported_dims()):
        reason = f"it has no kernel for head dimensions {d_qk} and {d_v}"
    return reason


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor, key: Tensor | None, *, scale: float, window: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """q [B, n, H, Dqk], k [B, Hkv, m, Dqk], v [B, Hkv, m, Dv] -> [B, n, H, Dv] in q's dtype.

    query int [B, n] and key int [B, m]: the tokens' positions in their sequence, -1 for a place that holds no key; key
    None: place p holds position p. A query sees the keys up to its own position, the last `window` of them if given; one
    that sees none gets 0. "auto" takes on a GPU Triton for one token a sequence where it has the head dimensions, else SDPA;
    on a CPU the reference. Raises ValueError on shapes that do not fit together and on an impl that cannot be had.
    """
    B, n, H, Dqk = q.shape
    Hkv, m, Dv = v.shape[1:]
    if H % Hkv or tuple(k.shape) != (B, Hkv, m, Dqk) or v.shape[0] != B:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if tuple(query.shape) != (B, n) or key is not None and tuple(key.shape) != (B, m):
        got = [list(x.shape) for x in (query, key) if x is not None]
        raise ValueError(f"positions must be {[B, n]} and {[B, m]}, got {' and '.join(map(str, got))}")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl == "triton" or impl == "auto" and q.is_cuda:
        reason = why_not_triton(q.device, q.dtype, n, Dqk, Dv)
        if impl == "triton" and reason:
            raise ValueError(f"impl='triton' cannot be had: {reason}; use impl='auto'")
        impl = "sdpa" if reason else "triton"
    if impl == "triton":
        from sieve.kernels.full import decode_triton  # needs the package triton

        with torch.no_grad():
            return decode_triton.cached_attention(q, k, v, query, key, scale=scale, window=window)
    if key is None:
        key = torch.arange(m, dtype=torch.int32, device=q.device).expand(B, -1)
    heads = q.unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, n, Dqk]
    outs = []
    for start in range(0, n, CHUNK):
        at = query[:, start : start + CHUNK, None]  # [B, c, 1]
        visible = (key[:, None] >= 0) & (key[:, None] <= at)
        if window is not None:
            visible &= key[:, None] > at - window
        part = heads[:, :, :, start : start + CHUNK]
        if impl == "reference" or impl == "auto" and q.device.type == "cpu":
            dtype = compute_dtype(q)
            o, _ = attend(part.to(dtype), k.to(dtype), v.to(dtype), visible[:, None, None], scale)
        else:
            padded = one_head_size(part, k[:, :, None], v[:, :, None])
            some = visible.any(-1)
            mask = visible | ~some[..., None]  # a row that sees nothing would be NaN
            o = attend_fused(*padded, mask[:, None, None].expand(-1, Hkv, -1, -1, -1).flatten(0, 1), scale)[..., :Dv]
            o = torch.where(some[:, None, None, :, None], o, 0.0)
        outs.append(o.to(q.dtype))
    return torch.cat(outs, 3).permute(0, 3, 1, 2, 4).flatten(2, 3)
