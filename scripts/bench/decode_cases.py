"""One step of one layer with a cache: tensors, ours launch by launch, full attention by what is installed, bytes read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts.bench.cases import Shape

if TYPE_CHECKING:  # it needs the package triton
    from sieve.kernels.nsa.decode_tiles import DecodeTiles
    from sieve.kernels.nsa.decode_triton import Launches

Call = Callable[[], object]
RIVALS = ("triton", "cudnn", "cudnn-folded", "fa2", "fa2-folded", "fa4", "fa4-folded")


@dataclass(frozen=True)
class DecodeCase:
    """A batch whose queries are the sequences' last tokens. q [B, 1, H, Dqk]; kv: k_cmp, v_cmp, k_slc, v_slc, k_win, v_win."""

    shape: Shape
    geometry: Geometry
    q: Tensor
    kv: tuple[Tensor, ...]
    gates: Tensor
    query: Tensor
    window_key: Tensor
    longest: int

    @property
    def scale(self) -> float:
        return self.shape.d_qk**-0.5


def draw(
    shape: Shape, lengths: list[int], geometry: Geometry, capacity: int | None = None, *, device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> DecodeCase:
    """Normal queries, keys and values of sequences of those lengths in caches of `capacity` tokens (None: the longest)."""
    rng, B, room = torch.Generator(device).manual_seed(seed), len(lengths), capacity or max(lengths)
    slots = -(-(room // geometry.kernel_stride + 1) // 16) * 16

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng, device=device, dtype=dtype)

    query = torch.tensor(lengths, dtype=torch.int32, device=device)[:, None] - 1
    place = torch.arange(geometry.window_size, dtype=torch.int32, device=device)
    places, dims = (slots, room, geometry.window_size), (shape.d_qk, shape.d_v)
    return DecodeCase(
        shape, geometry, make(B, 1, shape.heads, shape.d_qk),
        tuple(make(B, shape.kv_heads, n, d) for n in places for d in dims),
        torch.rand(B, 1, shape.heads, 3, generator=rng, device=device).to(dtype), query,
        (query - torch.remainder(query - place, geometry.window_size)).clamp(min=-1), max(lengths),
    )


def cache_entries(tokens: int, geometry: Geometry) -> int:
    """Keys a query reads at the end of a sequence of `tokens`: compressed blocks, selected tokens, window."""
    g = geometry
    compressed = max(0, (tokens - g.kernel_size) // g.kernel_stride + 1)
    selected = min((tokens - 1) // g.block_size, g.topk - 1) * g.block_size + (tokens - 1) % g.block_size + 1
    return compressed + selected + min(tokens, g.window_size)


def entry_bytes(shape: Shape, itemsize: int = 2) -> int:
    """Of one token's key and value in all KV heads."""
    return shape.kv_heads * (shape.d_qk + shape.d_v) * itemsize


def ours(case: DecodeCase, tiles: DecodeTiles | None = None) -> tuple[Call, Launches]:
    """The operator, and its launches one by one, which go on from what the ones before left: all have run once."""
    from sieve.kernels.nsa.decode_triton import launches, nsa_decode

    args = (case.q, *case.kv, case.gates, case.query)
    found = launches(*args, case.geometry, scale=case.scale, tiles=tiles)
    for call in found.calls.values():
        call()

    def whole() -> Tensor:
        return nsa_decode(*args, case.window_key, case.longest, case.geometry, scale=case.scale, tiles=tiles)[0]

    return whole, found


def rival(case: DecodeCase, name: str) -> Call:
    """Full attention over the selection's keys and values, all sequences of one length, so that no mask is needed.

    "folded": a KV group's query heads as so many queries of one head, which is the same attention and reads K and V once.
    ImportError for what is not installed; what does not serve a shape raises when called.
    """
    k, v = case.kv[2:4]
    q = case.q.transpose(1, 2)  # [B, H, 1, D]
    if name == "triton":
        from sieve.kernels.full.decode_triton import cached_attention

        return lambda: cached_attention(case.q, k, v, case.query, None, scale=case.scale)
    backend, _, folded = name.partition("-")
    if folded:
        q = q.unflatten(1, (k.shape[1], -1)).flatten(3)  # [B, Hkv, G, D]
    if backend == "fa4":
        attention = importlib.import_module("flash_attn.cute").flash_attn_func
        fa4 = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))

        def flash() -> Tensor:
            out = attention(*fa4, softmax_scale=case.scale, causal=False)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2).reshape(*case.q.shape[:3], -1)

        return flash
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}[backend]
    if backend == "fa2" and q.shape[3] != v.shape[3]:
        from sieve.kernels.full.sdpa import one_head_size

        q, k, v = one_head_size(q, k, v)

    def call() -> Tensor:
        with sdpa_kernel(kind):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.scale, enable_gqa=not folded)
        return out[..., : case.shape.d_v].reshape(*case.q.shape[:3], -1)

    return call
