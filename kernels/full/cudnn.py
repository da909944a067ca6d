"""Causal attention through cuDNN where every document is as long as the others: a plain batch, with nothing to mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sieve.kernels.nsa.layout import Packing

HEAD_DIM = 128  # the largest that cuDNN's backward takes on Hopper


def why_not_cudnn(q: Tensor, v: Tensor) -> str | None:
    """The reason why cuDNN cannot serve tensors like these, whatever their documents; None when it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, it needs cuda"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if max(q.shape[2], v.shape[2]) > HEAD_DIM or q.shape[2] % 8 or v.shape[2] % 8:
        return f"it takes heads of a multiple of 8 up to {HEAD_DIM}, not {q.shape[2]} and {v.shape[2]}"
    return None


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float) -> Tensor:
    """q [T, H, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv] of an even packing -> [T, H, Dv]. Does not sync."""
    rows = packing.num_documents
    q, k, v = (x.unflatten(0, (rows, x.shape[0] // rows)).transpose(1, 2) for x in (q, k, v))  # [rows, heads, S, D]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)
