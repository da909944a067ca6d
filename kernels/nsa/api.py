"""Native Sparse Attention: one entry, arguments checked, implementation chosen. Imports without triton."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from sieve.kernels.common import availability
from sieve.kernels.common.compiling import constant
from sieve.kernels.common.log import log_once
from sieve.kernels.nsa import reference, sdpa
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing

Impl = Literal["auto", "triton", "sdpa", "reference"]
IMPLS = ("auto", "triton", "sdpa", "reference")
TRITON_MODULE = "sieve.kernels.nsa.triton_ops"


@constant
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot serve tensors of this device and dtype; None when they can."""
    reason = availability.why_not_triton(device, dtype)
    if reason is None and importlib.util.find_spec(TRITON_MODULE) is None:
        reason = f"{TRITON_MODULE} is not part of this installation"
    return reason


def resolve_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> Literal["triton", "sdpa", "reference"]:
    """Which implementation runs. "auto" logs its choice once: on CUDA Triton where it can, else the reference; on a CPU
    sdpa, which computes the same and is faster there.

    Raises ValueError for an unknown name, and for "triton" where it cannot be had, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl in ("reference", "sdpa"):
        return impl
    if impl == "auto" and device.type != "cuda":
        log_once(__name__, f"nsa attention: sdpa (plain PyTorch), since the tensors are on {device.type}")
        return "sdpa"
    reason = why_not_triton(device, dtype)
    if impl == "triton":
        if reason is not None:
            raise ValueError(f"impl='triton' cannot be had: {reason}; use impl='reference' or 'auto'")
        return "triton"
    if reason is not None:
        log_once(__name__, f"nsa attention: reference (plain PyTorch), since triton cannot be had: {reason}")
        return "reference"
    log_once(__name__, f"nsa attention: triton, on {device.type} in {dtype}")
    return "triton"


def _check(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry,
) -> None:
    for name, x in (("q", q), ("v_slc", v_slc)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be [T, heads, head_dim], got {list(x.shape)}")
    (T, H, Dqk), Hkv, Dv = q.shape, v_slc.shape[1], v_slc.shape[2]
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"q has {H} heads {list(q.shape)}, not divisible by the {Hkv} of v_slc {list(v_slc.shape)}")
    if packing.total_tokens != T:
        raise ValueError(f"packing lays out {packing.total_tokens} tokens, q {list(q.shape)} has {T}")
    C = T // geometry.kernel_stride
    wanted = {
        "k_cmp": (k_cmp, (C, Hkv, Dqk)), "v_cmp": (v_cmp, (C, Hkv, Dv)), "k_slc": (k_slc, (T, Hkv, Dqk)),
        "v_slc": (v_slc, (T, Hkv, Dv)), "k_win": (k_win, (T, Hkv, Dqk)), "v_win": (v_win, (T, Hkv, Dv)),
        "gates": (gates, (T, H, 3)),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside q {list(q.shape)}, got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
        if name != "gates" and x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}; they must agree")
    for name, x in (("q", q), ("gates", gates)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {x.dtype}")
    if packing.cu_seqlens.device != q.device:
        raise ValueError(f"packing is on {packing.cu_seqlens.device}, q on {q.device}")


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float, impl: Impl = "auto", save_outputs: bool = True,
) -> tuple[Tensor, Tensor]:
    """Native Sparse Attention over packed documents (arXiv 2502.11089, equations 5 to 12).

    q [T, H, Dqk], rotated; query head h reads KV group h // (H // Hkv).
    k_cmp [C, Hkv, Dqk], v_cmp [C, Hkv, Dv]: compressed blocks (phi applied, keys rotated) in the C = T // kernel_stride
        slots of CompressedSlots. k_slc, k_win [T, Hkv, Dqk], rotated; v_slc, v_win [T, Hkv, Dv].
    gates [T, H, 3] in (0, 1): compression, selection, window. scale: usually Dqk ** -0.5.
    save_outputs: keep the three branches' outputs, 3 * T * H * Dv elements, for the backward; without it the Triton
        kernels compute them again there, with bit-equal gradients. The other implementations keep what autograd keeps.
    Returns out [T, H, Dv] in q's dtype, and int32 [T, Hkv, topk], the selection blocks each query read: numbers within
    the document, ascending, -1 past the last. Gradients are exact but for the selection, which has none.
    Raises ValueError on shapes, dtypes or devices that do not fit together, and on an impl that cannot be had.
    """
    _check(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, packing, geometry)
    args = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, packing, geometry)
    chosen = resolve_impl(impl, q.device, q.dtype)
    if chosen == "sdpa":
        return sdpa.nsa_attention(*args, scale=scale)
    if chosen == "triton":
        from sieve.kernels.nsa import triton_ops  # needs the package triton

        return triton_ops.nsa_attention(*args, scale=scale, save_outputs=save_outputs)
    return reference.nsa_attention(*args, scale=scale)
