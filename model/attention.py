"""Grouped-query attention (arXiv 2305.13245) over the whole document or over a window of it."""

from __future__ import annotations

from torch import Tensor, nn

from sieve.kernels.full.api import attention
from sieve.kernels.full.decode import cached_attention
from sieve.model.cache import FullCache, WindowCache
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.context import Context
from sieve.model.norm import RMSNorm
from sieve.model.projection import project
from sieve.model.rope import attention_scale, rotate_each

# The layer's `impl` names NSA's kernels; this is what the dense kernels call the same wish.
DENSE_IMPL = {"auto": "auto", "triton": "auto", "sdpa": "auto", "reference": "reference"}


def dense_impl(config: AttentionConfig) -> str:
    """What the dense kernels are asked for; the reference, when it is wanted, is wanted of everything."""
    return config.dense_impl if config.dense_impl != "auto" and config.impl != "reference" else DENSE_IMPL[config.impl]


class Attention(nn.Module):
    """Causal attention within documents: x [T, hidden] -> [T, hidden] and an empty dict (it has nothing to report).

    window: how many tokens a query sees, its own included; None for all. Optional: RMS norm of q and k per head before
    RoPE (qk_norm), and a sigmoid gate per head and token on the output (output_gate, arXiv 2505.06708).
    """

    def __init__(self, model: ModelConfig, config: AttentionConfig, window: int | None) -> None:
        super().__init__()
        hidden, heads, groups = model.hidden_size, model.num_heads, model.num_kv_heads
        self.heads, self.groups, self.window, self.impl = heads, groups, window, dense_impl(config)
        self.scale = attention_scale(model.rope, model.head_dim_qk)
        self.q_proj = nn.Linear(hidden, heads * model.head_dim_qk, bias=False)
        self.k_proj = nn.Linear(hidden, groups * model.head_dim_qk, bias=False)
        self.v_proj = nn.Linear(hidden, groups * model.head_dim_v, bias=False)
        self.o_proj = nn.Linear(heads * model.head_dim_v, hidden, bias=False)
        self.q_norm = RMSNorm(model.head_dim_qk, model.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(model.head_dim_qk, model.norm_eps) if config.qk_norm else nn.Identity()
        self.output_gate = nn.Linear(hidden, heads, bias=False) if config.output_gate else None

    def forward(
        self, x: Tensor, *, context: Context, cache: FullCache | WindowCache | None = None
    ) -> tuple[Tensor, dict]:
        """With a cache, x are the tokens of context.chunk, which it takes in."""
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj, step=context.step)
        q, k = self.q_norm(q.unflatten(-1, (self.heads, -1))), self.k_norm(k.unflatten(-1, (self.groups, -1)))
        q, k = rotate_each((q, k), context.rotation)
        v = v.unflatten(-1, (self.groups, -1)).contiguous()
        chunk = context.chunk
        stored = None if cache is None else cache.extend(k, v, chunk)
        if stored is None or chunk.fresh:
            out = attention(q, k, v, context.packing, scale=self.scale, window=self.window, impl=self.impl)
        else:
            keys, values, position = stored
            out = chunk.unpad(cached_attention(
                chunk.pad(q), keys, values, chunk.query, position, scale=self.scale, window=self.window,
                impl="reference" if self.impl == "reference" else "auto",
            ))  # [T, H, Dv]
        if self.output_gate is not None:
            out = out * self.output_gate(x).sigmoid().unsqueeze(-1)
        return self.o_proj(out.flatten(1)), {}
