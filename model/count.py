"""How many parameters a model has and how many FLOPs it takes, by closed formulas: nothing is built."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sieve.kernels.nsa.geometry import Geometry
from sieve.model.config import AttentionConfig, ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """total: all parameters, a tied head counted once. active: total less the routed experts a token does not visit.

    by_part: embedding, lm_head, projections, phi, gates, norms, mlp, shared, experts, router; they add up to total.
    """

    total: int
    active: int
    by_part: dict[str, int]


def count_parameters(model: ModelConfig, attention: AttentionConfig, vocab: int) -> ParameterCount:
    """The parameters of Decoder(model, attention, vocab)."""
    hidden, heads, moe = model.hidden_size, model.num_heads, model.moe
    dim_qk, dim_v = model.head_dim_qk, model.head_dim_v
    parts: Counter[str] = Counter(
        embedding=vocab * hidden, lm_head=0 if model.tie_embeddings else vocab * hidden, norms=hidden
    )
    idle = 0
    for index, kind in enumerate(attention.layer_types(model.num_layers)):
        parts["norms"] += 2 * hidden
        parts["projections"] += _projections(model, attention, kind)
        if attention.qk_norm:
            own = 1 if kind != "nsa" else 2 if attention.share_kv else 3
            parts["norms"] += (1 + own) * dim_qk
        if kind == "nsa":
            parts["gates"] += hidden * 3 * heads
            parts["phi"] += _phi_parameters(attention, dim_qk) + _phi_parameters(attention, dim_v)
        elif attention.output_gate:
            parts["gates"] += hidden * heads
        if moe is not None and index >= moe.first_dense_layers:
            expert = 3 * hidden * moe.expert_size
            parts["router"] += moe.num_experts * hidden
            parts["experts"] += moe.num_experts * expert
            parts["shared"] += moe.num_shared * expert
            idle += (moe.num_experts - moe.top_k) * expert
        else:
            parts["mlp"] += 3 * hidden * model.intermediate_size
    total = sum(parts.values())
    return ParameterCount(total, total - idle, dict(parts))


def flops_per_token(model: ModelConfig, attention: AttentionConfig, vocab: int, seq_len: int) -> dict[str, float]:
    """Training FLOPs per token by part, mean over a document of seq_len tokens: forward times three.

    What the model needs, not what an implementation spends: visible query-key pairs only (causal half, NSA's own),
    nothing recomputed; a multiply-add is 2. Left out as usual: norms, RoPE, softmax, activations, embedding look-ups.
    Parts: projections; full and window (layers of that type; NSA layers are full up to dense_len tokens); cmp, slc,
    win (NSA's branches); scores (NSA's sums over heads and blocks, equation 9: forward only, since selection has no
    gradient); phi; gates (with the mixing they do); mlp, shared, experts (the visited ones), router; lm_head.
    """
    hidden, heads, groups = model.hidden_size, model.num_heads, model.num_kv_heads
    geometry, moe, S = attention.geometry(), model.moe, seq_len
    pair = 2 * heads * (model.head_dim_qk + model.head_dim_v)  # q k^T and p v of one query and key, all heads
    forward: Counter[str] = Counter(lm_head=2 * hidden * vocab)
    for index, kind in enumerate(attention.layer_types(model.num_layers)):
        dense = kind == "nsa" and S <= attention.dense_len  # a full-attention layer, and without an output gate
        if dense:
            kind = "full"
        forward["projections"] += 2 * _projections(model, attention, kind)
        if kind == "nsa":
            forward["cmp"] += pair * compressed_pairs(S, geometry) / S
            forward["slc"] += pair * selected_pairs(S, geometry) / S
            forward["win"] += pair * window_pairs(S, geometry.window_size) / S
            candidates = _steps(S, geometry.block_size)  # pairs of a query and a block it may select
            sums = heads * compressed_pairs(S, geometry) + groups * 2 * len(geometry.overlap) * candidates
            forward["scores"] += sums / S / 3  # a third of three
            blocks = max(0, (S - geometry.kernel_size) // geometry.kernel_stride + 1)
            phi = _phi_flops(attention, model.head_dim_qk) + _phi_flops(attention, model.head_dim_v)
            forward["phi"] += groups * phi * blocks / S
            forward["gates"] += 2 * hidden * 3 * heads + 2 * 3 * heads * model.head_dim_v
        else:
            window = geometry.window_size if kind == "window" else S
            forward[kind] += pair * window_pairs(S, window) / S
            if attention.output_gate and not dense:
                forward["gates"] += 2 * hidden * heads + heads * model.head_dim_v
        if moe is not None and index >= moe.first_dense_layers:
            expert = 2 * 3 * hidden * moe.expert_size
            forward["router"] += 2 * hidden * moe.num_experts
            forward["experts"] += moe.top_k * expert
            forward["shared"] += moe.num_shared * expert
        else:
            forward["mlp"] += 2 * 3 * hidden * model.intermediate_size
    return {part: 3 * float(flops) for part, flops in forward.items()}


def dense_flops_per_token(model: ModelConfig, attention: AttentionConfig, vocab: int, seq_len: int) -> dict[str, float]:
    """flops_per_token of the same model with full attention in every layer, for `perf/mfu_dense_equivalent`."""
    full = attention.model_copy(update={"type": "full", "layers": None})
    return flops_per_token(model, full, vocab, seq_len)


def window_pairs(seq_len: int, window: int) -> int:
    """Visible query-key pairs of a document when a query sees its last `window` tokens, its own included."""
    full = min(seq_len, window)
    return full * (full + 1) // 2 + (seq_len - full) * window


def compressed_pairs(seq_len: int, geometry: Geometry) -> int:
    """Pairs of a query and a compressed block it sees: block i from position i * d + l - 1 on."""
    return _steps(seq_len - geometry.kernel_size + 1, geometry.kernel_stride)


def selected_pairs(seq_len: int, geometry: Geometry) -> int:
    """Pairs of a query and a token of its selected blocks: all before topk blocks exist, then topk - 1 whole blocks and
    the current one up to the query (it is forced, so it is always among them)."""
    size = geometry.block_size
    dense = min(seq_len, geometry.topk * size)
    rest = seq_len - dense
    whole, part = divmod(rest, size)
    current = whole * size * (size + 1) // 2 + part * (part + 1) // 2
    return dense * (dense + 1) // 2 + rest * (geometry.topk - 1) * size + current


def _steps(count: int, step: int) -> int:
    """The sum of u // step + 1 for u in [0, count)."""
    whole, part = divmod(max(0, count), step)
    return step * whole * (whole + 1) // 2 + part * (whole + 1)


def _projections(model: ModelConfig, attention: AttentionConfig, kind: str) -> int:
    """Weights of a layer's q, k, v and output projections."""
    branches = 3 if kind == "nsa" and not attention.share_kv else 1
    q_and_o = model.num_heads * (model.head_dim_qk + model.head_dim_v)
    return model.hidden_size * (q_and_o + branches * model.num_kv_heads * (model.head_dim_qk + model.head_dim_v))


def _phi_products(attention: AttentionConfig, dim: int) -> int:
    """Weights of phi's matrices, each of which meets a block once."""
    if attention.phi == "mean":
        return 0
    rows = (attention.phi_hidden or 2 * dim) if attention.phi == "mlp" else dim
    return rows * attention.kernel_size * dim + (rows * dim if attention.phi == "mlp" else 0)


def _phi_parameters(attention: AttentionConfig, dim: int) -> int:
    position = 0 if attention.phi == "mean" else attention.kernel_size * dim
    return _phi_products(attention, dim) + position


def _phi_flops(attention: AttentionConfig, dim: int) -> int:
    """Of one block and KV head; a mean is additions."""
    return 2 * _phi_products(attention, dim) if attention.phi != "mean" else attention.kernel_size * dim
