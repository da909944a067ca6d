"""Full and sliding-window attention over packed documents: one signature, arguments checked, implementation chosen."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sieve.kernels.common.log import log_once
from sieve.kernels.full.cudnn import cudnn_attention, why_not_cudnn
from sieve.kernels.full.reference import causal_attention
from sieve.kernels.full.sdpa import sdpa_attention
from sieve.kernels.full.varlen import varlen_attention, why_not_varlen
from sieve.kernels.nsa.api import why_not_triton
from sieve.kernels.nsa.layout import Packing

Impl = Literal["auto", "varlen", "cudnn", "triton", "sdpa", "reference"]
IMPLS = ("auto", "varlen", "cudnn", "triton", "sdpa", "reference")


def resolve_impl(
    impl: Impl, q: Tensor, v: Tensor, window: int | None, even: bool = False
) -> Literal["varlen", "cudnn", "triton", "sdpa", "reference"]:
    """Which implementation runs; "auto" logs its choice once. ValueError when a named one cannot serve.

    "cudnn" serves full attention over documents of one length (`even`); all else is then chosen as by "auto".
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl == "reference":
        return "reference"
    if impl == "sdpa":
        return "sdpa"
    if impl == "triton":
        reason = why_not_triton(q.device, q.dtype)
        if reason is not None:
            raise ValueError(f"impl='triton' cannot be had: {reason}; use impl='auto'")
        return "triton"
    if impl == "cudnn":
        reason = why_not_cudnn(q, v)
        if reason is not None:
            raise ValueError(f"impl='cudnn' cannot be had: {reason}; use impl='auto'")
        if even and window is None:
            log_once(__name__, f"full attention: cudnn where documents are of one length, in {q.dtype}")
            return "cudnn"
    reason = why_not_varlen(q, v)
    if impl == "varlen":
        if reason is not None:
            raise ValueError(f"impl='varlen' cannot be had: {reason}; use impl='reference' or 'auto'")
        return "varlen"
    what = "full attention" if window is None else "window attention"
    if reason is None:
        log_once(__name__, f"{what}: varlen (FlashAttention over cu_seqlens), on {q.device.type} in {q.dtype}")
        return "varlen"
    if q.device.type == "cpu" or window is None:
        log_once(__name__, f"{what}: sdpa by document, since varlen cannot be had: {reason}")
        return "sdpa"
    log_once(__name__, f"{what}: reference (plain PyTorch), since varlen cannot be had: {reason}")
    return "reference"


def _check(q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be [T, heads, head_dim], got {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}; they must be one floating-point dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    T, H, Dqk = q.shape
    Hkv = k.shape[1]
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"q has {H} heads {list(q.shape)}, not divisible by the {Hkv} of k {list(k.shape)}")
    if tuple(k.shape) != (T, Hkv, Dqk):
        raise ValueError(f"k must be {[T, Hkv, Dqk]} beside q {list(q.shape)}, got {list(k.shape)}")
    if tuple(v.shape[:2]) != (T, Hkv):
        raise ValueError(f"v must be [{T}, {Hkv}, Dv] beside k {list(k.shape)}, got {list(v.shape)}")
    if packing.total_tokens != T:
        raise ValueError(f"packing lays out {packing.total_tokens} tokens, q {list(q.shape)} has {T}")
    if packing.cu_seqlens.device != q.device:
        raise ValueError(f"packing is on {packing.cu_seqlens.device}, q on {q.device}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the query's own token), or None")


def attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float, window: int | None = None, impl: Impl = "auto"
) -> Tensor:
    """Causal attention by document: q [T, H, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv] -> [T, H, Dv] in q's dtype.

    Query head h reads KV head h // (H // Hkv). window: keep the keys (t - window, t], the query's own included; None
    keeps all. "cudnn": where all documents are of one length (packing.even), and as "auto" elsewhere.
    "triton": NSA's window kernels, whose gradients are the same in every run, as those of FlashAttention are not.
    "auto" takes varlen (FlashAttention) on CUDA in half precision, else SDPA by document, but the chunked
    reference for windows on CUDA. Raises ValueError on shapes, dtypes or devices that do not fit together, and on an
    impl that cannot serve them.
    """
    _check(q, k, v, packing, window)
    even = impl == "cudnn" and packing.even  # a compiled graph that does not ask serves either
    chosen = resolve_impl(impl, q, v, window, even)
    if chosen == "varlen":
        return varlen_attention(q, k, v, packing, window, scale=scale)
    if chosen == "cudnn":
        return cudnn_attention(q, k, v, packing, scale=scale)
    if chosen == "triton":
        from sieve.kernels.nsa.window import window_attention

        return window_attention(q, k, v, packing, window, scale=scale)[0]
    if chosen == "sdpa":
        return sdpa_attention(q, k, v, packing, window, scale=scale)
    return causal_attention(q, k, v, packing, window, scale=scale)[0]
