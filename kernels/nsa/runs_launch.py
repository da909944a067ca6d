"""Launches of the Hopper kernel over runs of keys: which shapes it serves, its tiles, its descriptors."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sieve.kernels.common.dims import split_dim
from sieve.kernels.common.launch import multiprocessors
from sieve.kernels.nsa.compress_tiles import copyable
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.runs_dq_hopper import runs_backward_q
from sieve.kernels.nsa.runs_hopper import runs_forward

GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


SHARED_BYTES = 226 << 10  # of a multiprocessor, less the barriers


@functools.cache
def hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def fits(q: Tensor, kv_heads: int, d_v: int, geometry: Geometry | None = None) -> bool:
    """Whether the kernel takes these shapes: 16-bit, a power of two of heads a group, d_v a power of two up to 128, and for
    the compression branch (`geometry`) tiles of at most kernel_size tokens, so that a document that begins within one sees
    nothing there."""
    group, d_qk = q.shape[1] // kv_heads, q.shape[2]
    return (
        q.dtype in GLUON and group & (group - 1) == 0 and group <= 64 and d_v in (32, 64, 128) and d_qk <= 192
        and (geometry is None or 128 // group <= geometry.kernel_size)
    )  # fmt: skip


def serves(q: Tensor, kv_heads: int, d_v: int, geometry: Geometry | None = None) -> bool:
    """Whether the kernel runs on q's device and takes its shapes."""
    return hopper(q.device) and fits(q, kv_heads, d_v, geometry)


def slots_together(d_qk: int, d_v: int) -> int:
    """Of a step of the compression branch."""
    return 128 if d_qk + d_v <= 256 else 64


def steps(d_qk: int, d_v: int, keys: int) -> int:
    """How many steps of `keys` keys and values fit beside two tiles of queries and the one that outputs pass through."""
    return min((SHARED_BYTES - 2 * (256 * d_qk + 64 * d_v)) // (2 * keys * (d_qk + d_v)), 4)


@functools.cache  # making one takes as long as a launch
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON[dtype])


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Blocks of x, past whose end they read zeros; see `copyable`."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(tuple(block), x.dtype))


def _parts(x: Tensor, rows: list[int], d0: int, d1: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of the two parts of `split_dim`; where there is one part, it stands in for the second."""
    first = descriptor(x, [*rows, d0])
    return first, descriptor(x, [*rows, d1]) if d1 else first


def attend(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, o: Tensor | None, lse: Tensor, *, scale: float,
    geometry: Geometry | None = None, window: int = 0, first_token: int = 0,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, keys: int | None = None, stages: int | None = None,
) -> None:
    """Writes o [n, H, Dv] (unless None) and lse fp32 [n, H] of q [n, H, Dqk], all contiguous but q.

    With `geometry`, the compression branch: k, v in slots. Without, the window branch over `window` tokens: the queries are
    the packed tokens from first_token on, and gated = (o_cmp, o_slc, gates, out) asks for equation 5's sum in `out` too.
    packing.doc and .position are the queries'. keys: of a step; stages: how many steps of k and v are held.
    """
    tokens, heads, d_qk = q.shape
    num_keys, kv_heads, d_v = v.shape
    (d0, d1), group = split_dim(d_qk), heads // kv_heads
    keys = keys or (slots_together(d_qk, d_v) if geometry is not None else 64)
    stages = stages or steps(d_qk, d_v, keys)
    q = copyable(q)
    k = copyable(k.contiguous()).view(num_keys, -1)
    v = copyable(v.contiguous()).view(num_keys, -1)
    o_cmp, o_slc, gates, out = gated or (lse, lse, lse, lse)
    work = triton.cdiv(tokens, 128 // group) * kv_heads
    kernel, stride = (geometry.kernel_size, geometry.kernel_stride) if geometry is not None else (0, 0)
    rows = [64 // group, group]
    runs_forward[(min(work, multiprocessors(q.device)),)](
        *_parts(q, rows, d0, d1), *_parts(k, [keys], d0, d1), descriptor(v, [keys, d_v]),
        packing.doc, packing.position, packing.cu_seqlens, out if o is None else o, lse, out, o_cmp, o_slc, gates,
        gates.stride(0), gates.stride(1), tokens, first_token, window, work, scale / math.log(2),
        HEADS=heads, GROUP=group, D0=d0, D1=d1, E0=d_v, KERNEL=kernel, STRIDE=stride, KEYS=keys, STAGES=stages,
        COMBINE=gated is not None, KEEP=o is not None, num_warps=4,
    )  # fmt: skip


def attend_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, packing: Packing, dq: Tensor, *, scale: float,
    add: bool, geometry: Geometry | None = None, window: int = 0,
) -> None:
    """Writes or adds the gradient of `attend`'s q to dq [T, H, Dqk] (last stride 1), of all T tokens.

    do [T, H, Dv]; lse, delta = sum(o * do): fp32 [T, H], contiguous. lse may be shifted by -log of a factor of do.
    """
    (tokens, heads, d_qk), (num_keys, kv_heads, d_v) = q.shape, v.shape
    (d0, d1), group, keys = split_dim(d_qk), heads // kv_heads, 64
    q, do = copyable(q), copyable(do)
    k = copyable(k.contiguous()).view(num_keys, -1)
    v = copyable(v.contiguous()).view(num_keys, -1)
    work = triton.cdiv(tokens, 128 // group) * kv_heads
    kernel, stride = (geometry.kernel_size, geometry.kernel_stride) if geometry is not None else (0, 0)
    rows = [64 // group, group]
    runs_backward_q[(min(work, multiprocessors(q.device)),)](
        *_parts(q, rows, d0, d1), descriptor(do, [*rows, d_v]), *_parts(k, [keys], d0, d1), descriptor(v, [keys, d_v]),
        packing.doc, packing.position, packing.cu_seqlens, lse, delta, dq, dq.stride(0), dq.stride(1),
        tokens, window, work, scale / math.log(2), scale,
        HEADS=heads, GROUP=group, D0=d0, D1=d1, E=d_v, KERNEL=kernel, STRIDE=stride, KEYS=keys, K_STAGES=3, V_STAGES=2,
        ADD=add, num_warps=4,
    )  # fmt: skip
