"""The Native Sparse Attention layer (arXiv 2502.11089): projections, compression, gates; the attention is a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sieve.kernels.full.api import attention
from sieve.kernels.full.decode import cached_attention
from sieve.kernels.nsa.api import nsa_attention, resolve_impl
from sieve.kernels.nsa.decode import nsa_decode
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import CompressedSlots
from sieve.kernels.nsa.phi import AfterPhi, PhiWeights, compress
from sieve.model.attention import DENSE_IMPL
from sieve.model.cache import NSACache
from sieve.model.chunk import Chunk
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.context import Context
from sieve.model.norm import RMSNorm
from sieve.model.projection import project
from sieve.model.rope import attention_scale, rotate, rotate_each


class Phi(nn.Module):
    """Equation 7's learned map from a block's kernel_size tokens to one, shared by a layer's KV heads.

    x [T, Hkv, D] -> [C, Hkv, D] in slots. The position embedding inside the block makes a bias of the first layer
    superfluous; the output needs none, since a shift of all keys moves no softmax and values pass o_proj.
    """

    def __init__(self, config: AttentionConfig, head_dim: int) -> None:
        super().__init__()
        self.kind, self.geometry = config.phi, config.geometry()
        fan_in, hidden = config.kernel_size * head_dim, config.phi_hidden or 2 * head_dim
        if self.kind != "mean":  # values: see sieve.model.init
            self.position = nn.Parameter(torch.full((config.kernel_size, head_dim), math.nan))
            self.w_in = nn.Parameter(torch.full((hidden if self.kind == "mlp" else head_dim, fan_in), math.nan))
        if self.kind == "mlp":
            self.w_out = nn.Parameter(torch.full((head_dim, hidden), math.nan))

    def forward(self, x: Tensor, slots: CompressedSlots) -> Tensor:
        return compress(x, slots, self.geometry, self.weights())

    def weights(self) -> PhiWeights:
        position, w_in, w_out = (getattr(self, name, None) for name in ("position", "w_in", "w_out"))
        return PhiWeights(self.kind, position=position, w_in=w_in, w_out=w_out)


class _WithIdle(torch.autograd.Function):
    """x, and zero gradients for parameters that have no part in it: ranks whose documents differ in length then reduce
    the same tensors, and an optimizer sees the same parameters every step."""

    @staticmethod
    def forward(ctx, x: Tensor, *idle: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in idle]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


class NSA(nn.Module):
    """Compression, selection and window branches, mixed by a sigmoid gate per head and token.

    x [T, hidden] -> [T, hidden] and what sieve.model.health looks at: {"gates": [T, H, 3], "indices": int32 [T, Hkv, topk]}.
    The selection branch's keys and values are `k_proj` and `v_proj`, the names they have in full attention, so that a
    twin starts from the same weights; with share_kv the other branches read them too. phi sees keys before RoPE (and
    before QK-norm, which is applied to its result); a compressed key is rotated at its block's first token.

    Where all documents are within dense_len, the layer is Attention of the same q, k, v and output projections: exactly
    that of its full-attention twin. Gates, phi and the other branches then get zero gradients, and health is NaN. With a
    cache that holds while all its sequences, new tokens included, are within dense_len.
    """

    def __init__(self, model: ModelConfig, config: AttentionConfig) -> None:
        super().__init__()
        hidden, heads, groups = model.hidden_size, model.num_heads, model.num_kv_heads
        dim_qk, dim_v = model.head_dim_qk, model.head_dim_v
        self.heads, self.groups, self.impl, self.share_kv = heads, groups, config.impl, config.share_kv
        self.save_outputs = config.save_outputs
        self.geometry: Geometry = config.geometry()
        self.operator: Callable[..., tuple[Tensor, Tensor]] | None = None  # what sieve.model.switches puts here
        self.scale = attention_scale(model.rope, dim_qk)
        self.q_proj = nn.Linear(hidden, heads * dim_qk, bias=False)
        self.k_proj = nn.Linear(hidden, groups * dim_qk, bias=False)
        self.v_proj = nn.Linear(hidden, groups * dim_v, bias=False)
        if not self.share_kv:
            self.k_cmp_proj = nn.Linear(hidden, groups * dim_qk, bias=False)
            self.v_cmp_proj = nn.Linear(hidden, groups * dim_v, bias=False)
            self.k_win_proj = nn.Linear(hidden, groups * dim_qk, bias=False)
            self.v_win_proj = nn.Linear(hidden, groups * dim_v, bias=False)
        self.k_phi, self.v_phi = Phi(config, dim_qk), Phi(config, dim_v)
        self.gate = nn.Linear(hidden, 3 * heads, bias=False)
        self.o_proj = nn.Linear(heads * dim_v, hidden, bias=False)

        def norm() -> nn.Module:
            return RMSNorm(dim_qk, model.norm_eps) if config.qk_norm else nn.Identity()

        self.q_norm, self.k_norm, self.k_cmp_norm = norm(), norm(), norm()
        if not self.share_kv:
            self.k_win_norm = norm()

    def forward(self, x: Tensor, *, context: Context, cache: NSACache | None = None) -> tuple[Tensor, dict]:
        """With a cache, x are the tokens of context.chunk, which it takes in."""
        dense = context.dense and cache is None
        q, k, v, *others = project(x, *self._projections(all=context.step), step=context.step)
        q = self.q_norm(q.unflatten(-1, (self.heads, -1)))
        k, v = self._split(k), self._split(v).contiguous()
        k_slc = self.k_norm(k)
        if dense:
            return self._dense(*rotate_each((q, k_slc), context.rotation), v, context)
        if self.share_kv:
            (gates,) = others or project(x, self.gate)
            q, k_slc = rotate_each((q, k_slc), context.rotation)
            k_cmp, v_cmp, k_win, v_win = k, v, k_slc, v
        else:
            # Not all in one product: a compiler makes one slow pass of the gradients of so many parts.
            others = others or (
                *project(x, self.k_cmp_proj, self.v_cmp_proj), *project(x, self.k_win_proj, self.v_win_proj, self.gate)
            )
            *others, gates = others
            k_cmp, v_cmp, k_win, v_win = map(self._split, others)
            q, k_slc, k_win = rotate_each((q, k_slc, self.k_win_norm(k_win)), context.rotation)
            v_win = v_win.contiguous()
        gates = gates.sigmoid().unflatten(-1, (self.heads, 3))
        chunk = context.chunk
        if cache is not None:
            k_cmp, v_cmp = cache.store(k_slc, v, k_cmp, v_cmp, k_win, v_win, chunk)
        k_cmp, v_cmp = self._compress(k_cmp, v_cmp, context, cache)
        if cache is not None:
            if context.dense:  # all is stored nevertheless, for when the sequences have grown
                cache.roll(k_win, v_win, chunk)
                return self.o_proj(self._decode_dense(q, k_slc, v, context, cache).flatten(1)), {}
            if not chunk.fresh:
                out, indices = self._decode(q, k_win, v_win, gates, chunk, cache)
                return self.o_proj(out.flatten(1)), {"gates": gates, "indices": indices}
            cache.roll(k_win, v_win, chunk)
        out, indices = (self.operator or nsa_attention)(
            q, k_cmp, v_cmp, k_slc, v, k_win, v_win, gates, context.packing, self.geometry,
            scale=self.scale, impl=self.impl, save_outputs=self.save_outputs,
        )
        return self.o_proj(out.flatten(1)), {"gates": gates.detach(), "indices": indices}

    def _projections(self, *, all: bool) -> tuple[nn.Linear, ...]:
        """Those that any attention has, or all but o_proj."""
        first = self.q_proj, self.k_proj, self.v_proj
        if not all:
            return first
        if self.share_kv:
            return *first, self.gate
        return *first, self.k_cmp_proj, self.v_cmp_proj, self.k_win_proj, self.v_win_proj, self.gate

    def _compress(self, k: Tensor, v: Tensor, context: Context, cache: NSACache | None) -> tuple[Tensor, Tensor]:
        """Keys and values before phi -> those of the slots [C, Hkv, D], and into a cache; of a step it may be there alone, and
        what is returned has no meaning."""
        if cache is not None:
            norm = (self.k_cmp_norm.weight, self.k_cmp_norm.eps) if isinstance(self.k_cmp_norm, RMSNorm) else None
            after = AfterPhi(norm, context.slot_rotation)
            if cache.compress(k, v, self.k_phi.weights(), self.v_phi.weights(), after, context.chunk):
                return k, v
        k = self.k_cmp_norm(self.k_phi(k, context.slots))
        if context.slot_rotation is not None:
            k = rotate(k, context.slot_rotation)
        v = self.v_phi(v, context.slots)
        if cache is not None:
            cache.compressed(k, v, context.chunk)
        return k, v

    def _decode(
        self, q: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, chunk: Chunk, cache: NSACache
    ) -> tuple[Tensor, Tensor]:
        """Of new tokens whose selection keys and compressed blocks the cache has already: [T, H, Dv], and the selected blocks
        int32 [T, Hkv, topk]."""
        if chunk.width > 1 and resolve_impl(self.impl, q.device, q.dtype) == "triton":
            return self._decode_runs(q, k_win, v_win, gates, chunk, cache)
        keys, values, position = cache.window(k_win, v_win, chunk)
        out, indices = nsa_decode(
            chunk.pad(q), cache["k_cmp"], cache["v_cmp"], cache["k_slc"], cache["v_slc"], keys, values,
            chunk.pad(gates), chunk.query, position, chunk.longest, self.geometry, scale=self.scale,
            impl="reference" if self.impl == "sdpa" else self.impl,
        )
        return chunk.unpad(out), chunk.unpad(indices)

    def _decode_runs(
        self, q: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, chunk: Chunk, cache: NSACache
    ) -> tuple[Tensor, Tensor]:
        """`_decode` of several new tokens of some sequence: one after the other."""
        from sieve.kernels.nsa.chunk_triton import attend_run  # needs the package triton

        outs, chosen = [], []
        runs = zip(chunk.pasts, q.split(chunk.counts), gates.split(chunk.counts), cache.runs(k_win, v_win, chunk))
        for row, (past, own, mixed, window) in enumerate(runs):
            if not len(own):
                continue
            stored = (cache[name][row] for name in ("k_cmp", "v_cmp", "k_slc", "v_slc"))
            out, indices = attend_run(own, *stored, *window, mixed, past, self.geometry, scale=self.scale)
            outs.append(out)
            chosen.append(indices)
        return torch.cat(outs), torch.cat(chosen)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, dict]:
        out = attention(q, k, v, context.packing, scale=self.scale, impl=DENSE_IMPL[self.impl])
        busy = ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "q_norm.", "k_norm.")
        idle = [p for name, p in self.named_parameters() if not name.startswith(busy)]
        return self.o_proj(_WithIdle.apply(out.flatten(1), *idle)), {}

    def _decode_dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: NSACache) -> Tensor:
        """As `_dense`, of new tokens whose selection keys the cache has already: [T, H, Dv]."""
        chunk, impl = context.chunk, DENSE_IMPL[self.impl]
        if chunk.fresh:
            return attention(q, k, v, context.packing, scale=self.scale, impl=impl)
        keys, values, position = cache.all(chunk)
        out = cached_attention(chunk.pad(q), keys, values, chunk.query, position, scale=self.scale, impl=impl)
        return chunk.unpad(out)

    def _split(self, x: Tensor) -> Tensor:
        """[T, Hkv * D] -> [T, Hkv, D]."""
        return x.unflatten(-1, (self.groups, -1))
