"""One pre-norm layer: attention, then the feed-forward network, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from sieve.model.attention import Attention
from sieve.model.cache import LayerCache
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.context import Context
from sieve.model.mlp import SwiGLU
from sieve.model.moe import MoE
from sieve.model.norm import RMSNorm
from sieve.model.nsa import NSA


class Block(nn.Module):
    """Layer `index` of a model: x [T, hidden] -> [T, hidden] and a dict of tensors.

    The dict: "gates" and "indices" (NSA layers; see NSA), "load" (fp32 [E]; MoE layers), "aux_loss" (fp32 scalar; MoE
    layers with balance="aux" or "both", or a router z-loss) and "sample" (fp32 [n, E]; see Routes).
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig, index: int) -> None:
        super().__init__()
        kind = attention.layer_types(model.num_layers)[index]
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps)
        if kind == "nsa":
            self.attention = NSA(model, attention)
        else:
            self.attention = Attention(model, attention, attention.window_size if kind == "window" else None)
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.routed = model.moe is not None and index >= model.moe.first_dense_layers
        if self.routed:
            self.mlp = MoE(model.hidden_size, model.moe)
        else:
            self.mlp = SwiGLU(model.hidden_size, model.intermediate_size)

    def forward(self, x: Tensor, *, context: Context, cache: LayerCache | None = None) -> tuple[Tensor, dict]:
        attended, aux = self.attention(self.attention_norm(x), context=context, cache=cache)
        x = x + attended
        if self.routed:
            out, routed = self.mlp(self.mlp_norm(x), context.real)
            aux = aux | routed
        else:
            out = self.mlp(self.mlp_norm(x), step=context.step)
        return x + out, aux
