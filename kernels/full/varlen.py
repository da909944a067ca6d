"""Causal and sliding-window attention through torch.nn.attention.varlen: FlashAttention over cu_seqlens, on CUDA."""

from __future__ import annotations

import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from sieve.kernels.common.compiling import constant
from sieve.kernels.nsa.layout import Packing


@constant
def _why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; 2.11 has"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, it needs cuda"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    return None


def why_not_varlen(q: Tensor, v: Tensor) -> str | None:
    """The reason why varlen cannot serve these tensors; None when it can."""
    reason = _why_not_here(q.device, q.dtype)
    if reason is None and max(q.shape[2], v.shape[2]) > 256:
        return f"it takes heads of at most 256, not {max(q.shape[2], v.shape[2])}"
    return reason


@constant
def _wants_to_be_told_of_groups() -> bool:
    """torch 2.11 takes fewer KV heads as they come; later versions want to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, *, scale: float
) -> Tensor:
    """q [T, H, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv], half precision on CUDA -> [T, H, Dv]. Does not sync."""
    from torch.nn.attention.varlen import varlen_attn

    Dqk, Dv = q.shape[2], v.shape[2]
    size = -(-max(Dqk, Dv) // 8) * 8
    # One head size, a multiple of 8; zeros change neither scores nor outputs.
    q, k, v = (F.pad(x, (0, size - x.shape[2])) if x.shape[2] != size else x for x in (q, k, v))
    grouped = {"enable_gqa": True} if _wants_to_be_told_of_groups() else {}
    o = varlen_attn(
        q, k, v, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), **grouped,
    )
    return o if Dv == size else o[..., :Dv]
