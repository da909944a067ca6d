"""Bytes that training keeps on one device, by closed formulas over what autograd saves: nothing is built."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from sieve.kernels.moe.reference import TILE, bound_of_rows
from sieve.model.config import AttentionConfig, ModelConfig

FLOAT = 4  # bytes of fp32
INDEX = 8  # bytes of int64


@dataclass(frozen=True)
class Kept:
    """What one forward keeps for the backward, in bytes by part, and what the largest layer keeps of that.

    by_part adds up to everything kept; largest_layer is what a layer that is computed again in the backward brings back.
    """

    by_part: dict[str, int]
    largest_layer: int

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


def _kept_whole(layer: Counter[str], tokens: int, hidden: int, size: int) -> Counter[str]:
    return layer


def _kept_input(layer: Counter[str], tokens: int, hidden: int, size: int) -> Counter[str]:
    return Counter(residual=tokens * hidden * size)


# What a layer keeps under each mode of activation checkpointing. A new mode is a new entry.
KEEP = {"none": _kept_whole, "block": _kept_input}


def activations(
    model: ModelConfig, attention: AttentionConfig, vocab: int, tokens: int, *, size: int, mode: str = "none",
    longest: int | None = None,
) -> Kept:
    """Of a forward of `tokens` tokens in elements of `size` bytes, with the operators that run on CUDA: Triton's NSA,
    FlashAttention. longest: the longest document (dense_len looks at it); None: all of the tokens.

    Left out: the batch itself, positions and document numbers, scalars. ValueError for an unknown mode.
    """
    if mode not in KEEP:
        raise ValueError(f"activation_checkpointing={mode!r} has no memory formula; there are {', '.join(KEEP)}")
    hidden, parts, largest = model.hidden_size, Counter(), 0
    for index, kind in enumerate(attention.layer_types(model.num_layers)):
        if kind == "nsa" and (tokens if longest is None else longest) <= attention.dense_len:
            kind = "dense"
        layer = _layer(model, attention, kind, index, tokens, size)
        largest = max(largest, layer.total())
        parts += KEEP[mode](layer, tokens, hidden, size)
    parts["head"] += tokens * (hidden * size + FLOAT) + tokens * hidden * size + vocab * hidden * FLOAT
    parts["rotation"] += tokens * model.head_dim_qk * FLOAT  # cos and sin, shared by all layers
    return Kept(dict(parts), largest)


def _layer(model: ModelConfig, attention: AttentionConfig, kind: str, index: int, T: int, size: int) -> Counter[str]:
    hidden = model.hidden_size
    kept: Counter[str] = Counter(residual=2 * T * hidden * size, norms=2 * T * (hidden * size + FLOAT))
    kept += _nsa(model, attention, T, size) if kind == "nsa" else _dense(model, attention, kind, T, size)
    if model.moe is not None and index >= model.moe.first_dense_layers:
        kept += _moe(model, T, size)
    else:
        kept["mlp"] += 4 * T * model.intermediate_size * size  # gate, silu(gate), up, their product
    return kept


def _dense(model: ModelConfig, attention: AttentionConfig, kind: str, T: int, size: int) -> Counter[str]:
    heads, groups, dim_qk, dim_v = model.num_heads, model.num_kv_heads, model.head_dim_qk, model.head_dim_v
    kept: Counter[str] = Counter()
    kept["attention"] += T * size * (heads * (dim_qk + dim_v) + groups * (dim_qk + dim_v))  # q, o, k, v
    kept["attention"] += T * heads * FLOAT  # lse
    if attention.qk_norm:
        kept["attention"] += T * (heads + groups) * (dim_qk * size + FLOAT)
    if attention.output_gate and kind != "dense":
        kept["gates"] += T * heads * size + T * heads * dim_v * size  # the gate, and the product o_proj reads
    return kept


def _nsa(model: ModelConfig, attention: AttentionConfig, T: int, size: int) -> Counter[str]:
    heads, groups, dim_qk, dim_v = model.num_heads, model.num_kv_heads, model.head_dim_qk, model.head_dim_v
    C, kv = T // attention.kernel_stride, dim_qk + dim_v
    sets = 1 if attention.share_kv else 2  # selection and window
    kept: Counter[str] = Counter()
    kept["attention"] += T * size * (heads * kv + sets * groups * kv) + C * groups * kv * size
    kept["attention"] += T * groups * attention.topk * 4 + 3 * T * heads * FLOAT  # indices, lse
    kept["gates"] += 3 * T * heads * size
    if attention.save_outputs:
        kept["branch outputs"] += 3 * T * heads * dim_v * size
    for dim in (dim_qk, dim_v):
        if attention.phi == "mean":
            continue
        width = (attention.phi_hidden or 2 * dim) if attention.phi == "mlp" else dim
        kept["phi"] += C * attention.kernel_stride * groups * dim * size  # the chunks
        kept["phi"] += width * attention.kernel_size * dim * size  # the weights, rearranged
        if attention.phi == "mlp":
            kept["phi"] += 2 * C * groups * width * size
    if attention.qk_norm:
        normed = T * (heads + sets * groups) + C * groups
        kept["attention"] += normed * (dim_qk * size + FLOAT)
    return kept


def _moe(model: ModelConfig, T: int, size: int) -> Counter[str]:
    moe, hidden = model.moe, model.hidden_size
    rows = bound_of_rows(T * moe.top_k, moe.num_experts, TILE)
    kept: Counter[str] = Counter()
    # Scores, and the order of all experts, of which the chosen ones are a view.
    kept["router"] += T * moe.num_experts * (FLOAT + INDEX) + T * (2 * moe.top_k + 1) * FLOAT
    if size < FLOAT:  # the router computes in fp32, on copies
        kept["router"] += T * hidden * FLOAT + moe.num_experts * hidden * FLOAT
    kept["router"] += T * moe.top_k * INDEX + rows * INDEX
    # Permuted rows; gate and up, silu(gate), its product with up, that times the routing weight.
    kept["experts"] += rows * size * (hidden + 5 * moe.expert_size + 1)
    if moe.num_shared:
        kept["shared"] += 4 * T * moe.num_shared * moe.expert_size * size
    return kept


def workspace(
    model: ModelConfig, attention: AttentionConfig, vocab: int, tokens: int, *, size: int, chunk: int
) -> dict[str, int]:
    """Bytes that live only while a part runs, by part: the largest one adds to the peak.

    loss: logits of one chunk in fp32 and rounded, and a product of the size of the head's weight. attention: gradients
    of q, k, v and o, with NSA the three branches' deltas and shifted lse. mlp: gradients of its inner activations.
    """
    heads, groups = model.num_heads, model.num_kv_heads
    kv = model.head_dim_qk + model.head_dim_v
    nsa = "nsa" in attention.layer_types(model.num_layers)
    sets = 1 if not nsa or attention.share_kv else 3
    inner = model.intermediate_size
    if model.moe is not None:
        inner = max(inner, model.moe.top_k * model.moe.expert_size)
    return {
        "loss": min(chunk, tokens) * vocab * (FLOAT + size) + vocab * model.hidden_size * size,
        "attention": tokens * size * (heads * kv + sets * groups * kv) + tokens * heads * FLOAT * (6 if nsa else 1),
        "mlp": 3 * tokens * inner * size,
    }


def states(parameters: int, *, stage: int, ranks: int, size: int, bucket: int) -> dict[str, int]:
    """Bytes a rank holds for `parameters` under ZeRO `stage` (arXiv 1910.02054): weights, fp32 masters, gradients
    accumulated in fp32, Adam's two moments in fp32, and the buckets (elements) that are reduced or gathered at once."""
    part = math.ceil(parameters / ranks)
    return {
        "weights": size * (part if stage == 3 else parameters),
        "masters": FLOAT * part if stage else 0,
        "gradients": FLOAT * (part if stage >= 2 else parameters),
        "moments": 2 * FLOAT * (part if stage else parameters),
        "buckets": min(bucket, parameters) * (FLOAT + (2 * size if stage == 3 else 0)) if stage and ranks > 1 else 0,
    }
