"""Bytes that training keeps on one device, by closed formulas over what autograd saves: nothing is built."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from sieve.kernels.moe.api import AUTO_ON_CUDA
from sieve.kernels.moe.reference import TILE, bound_of_rows
from sieve.model.config import AttentionConfig, LossConfig, ModelConfig
from sieve.model.loss import chunk_size, resolve_impl
from sieve.model.stack import Checkpointing

FLOAT = 4  # bytes of fp32
INT, INDEX = 4, 8  # bytes of int32, int64


# Elements of gradients that DeepSpeed copies into one buffer to reduce them where it does not reduce by buckets of ours,
# and of weights that its stage 3 leaves gathered for their next use: defaults of its settings, which we leave alone.
REDUCED_AT_ONCE = 500_000_000
GATHERED = 1_000_000_000

INPUT, RESULTS = "input", "attention results"  # parts of a layer that a mode of activation checkpointing names


@dataclass(frozen=True)
class Kept:
    """What one forward keeps for the backward, in bytes by part; again: what computing a layer again brings back, of the
    layer where that is most."""

    by_part: dict[str, int]
    again: int

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


# The parts of a layer that each mode of activation checkpointing keeps; None: all of them.
KEEP: dict[Checkpointing, tuple[str, ...] | None] = {
    "none": None, "attention": (INPUT, RESULTS), "block": (INPUT,), "full": (INPUT,),
}


def activations(
    model: ModelConfig, attention: AttentionConfig, vocab: int, tokens: int, *, size: int, mode: Checkpointing = "none",
    longest: int | None = None, compiled: bool = False, offload: bool = False,
) -> Kept:
    """Of a forward of `tokens` tokens in elements of `size` bytes, with the operators that run on CUDA: Triton's NSA,
    FlashAttention. longest: the longest document (dense_len looks at it); None: all of the tokens.

    compiled: as torch.compile's partitioner keeps it, which computes silu(gate) again; that is what the layers' saved
    tensors are in tests/model/test_memory.py, all else is taken to be kept as without it. offload: layers' inputs are on the
    host, but for two.
    Left out: the batch itself, positions and document numbers, scalars. ValueError for an unknown mode.
    """
    if mode not in KEEP:
        raise ValueError(f"activation_checkpointing={mode!r} has no memory formula; there are {', '.join(KEEP)}")
    if mode == "full":
        attention = attention.model_copy(update={"save_outputs": False})
    hidden, parts, again = model.hidden_size, Counter(), 0
    for index, kind in enumerate(attention.layer_types(model.num_layers)):
        if kind == "nsa" and (tokens if longest is None else longest) <= attention.dense_len:
            kind = "dense"
        layer = _layer(model, attention, kind, index, tokens, size, compiled)
        kept = layer if KEEP[mode] is None else Counter({part: layer[part] for part in KEEP[mode]})
        again = max(again, layer.total() - kept.total())
        parts += kept
    if offload:
        parts[INPUT] = min(parts[INPUT], 2 * tokens * hidden * size)
    parts["head"] += tokens * (hidden * size + FLOAT) + tokens * hidden * size + vocab * hidden * FLOAT
    parts["rotation"] += tokens * model.head_dim_qk * FLOAT  # cos and sin, shared by all layers
    return Kept(dict(parts), again)


def _layer(
    model: ModelConfig, attention: AttentionConfig, kind: str, index: int, T: int, size: int, compiled: bool
) -> Counter[str]:
    hidden = model.hidden_size
    kept: Counter[str] = Counter(norms=2 * T * (hidden * size + FLOAT), residual=T * hidden * size)
    kept[INPUT] += T * hidden * size
    kept += _nsa(model, attention, T, size) if kind == "nsa" else _dense(model, attention, kind, T, size)
    if model.moe is not None and index >= model.moe.first_dense_layers:
        kept += _moe(model, T, size, compiled)
    else:
        kept["mlp"] += _swiglu(compiled) * T * model.intermediate_size * size
    return kept


def _swiglu(compiled: bool) -> int:
    """How many tensors of its width SwiGLU keeps: gate, silu(gate), up and their product."""
    return 3 if compiled else 4


def _dense(model: ModelConfig, attention: AttentionConfig, kind: str, T: int, size: int) -> Counter[str]:
    heads, groups, dim_qk, dim_v = model.num_heads, model.num_kv_heads, model.head_dim_qk, model.head_dim_v
    kept: Counter[str] = Counter()
    kept["attention"] += T * size * (heads * dim_qk + groups * (dim_qk + dim_v))  # q, k, v
    kept[RESULTS] += T * heads * (dim_v * size + FLOAT)  # o, lse
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
    kept["attention"] += T * size * (heads * dim_qk + sets * groups * kv) + C * groups * kv * size
    kept[RESULTS] += T * heads * (dim_v * size + 3 * FLOAT) + T * groups * attention.topk * 4  # o, lse, indices
    kept["gates"] += 3 * T * heads * size
    if attention.save_outputs:
        kept[RESULTS] += 3 * T * heads * dim_v * size  # the branches' outputs
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


def _moe(model: ModelConfig, T: int, size: int, compiled: bool) -> Counter[str]:
    moe, hidden = model.moe, model.hidden_size
    kept: Counter[str] = Counter()
    # Scores, and the order of all experts, of which the chosen ones are a view.
    kept["router"] += T * moe.num_experts * (FLOAT + INDEX) + T * (2 * moe.top_k + 1) * FLOAT
    if size < FLOAT:  # the router computes in fp32, on copies
        kept["router"] += T * hidden * FLOAT + moe.num_experts * hidden * FLOAT
    impl = AUTO_ON_CUDA if moe.impl == "auto" else moe.impl
    rows = expert_rows(model, T)
    if impl == "torch":
        kept["router"] += T * moe.top_k * INDEX + rows * INDEX
        # Permuted rows; gate and up, silu(gate), its product with up, that times the routing weight, which is a column.
        kept["experts"] += rows * size * (hidden + (3 if compiled else 5) * moe.expert_size + 1)
    else:  # one operator, which keeps the first product and the order of rows
        kept["router"] += T * moe.top_k * INT + rows * (INT + FLOAT)
        kept["experts"] += rows * size * 2 * moe.expert_size
    if moe.num_shared:
        kept["shared"] += _swiglu(compiled) * T * moe.num_shared * moe.expert_size * size
    return kept


def expert_rows(model: ModelConfig, tokens: int) -> int:
    """Rows of the grouped products of a layer's experts, padding included."""
    impl = AUTO_ON_CUDA if model.moe.impl == "auto" else model.moe.impl
    tile = TILE
    if impl == "triton":
        from sieve.kernels.moe.gemm import TILE as tile  # needs the package triton
    return bound_of_rows(tokens * model.moe.top_k, model.moe.num_experts, tile)


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


def loss_impl(loss: LossConfig) -> str:
    """Which one runs on CUDA."""
    return resolve_impl("auto", torch.device("cuda")) if loss.impl == "auto" else loss.impl


def loss_chunk(loss: LossConfig, vocab: int, hidden: int, tokens: int) -> int:
    """Tokens whose logits exist at once on CUDA: see sieve.model.loss; with Liger about as many as make its logits as
    large as the hidden states (liger_kernel.ops.fused_linear_cross_entropy)."""
    impl = loss_impl(loss)
    if impl != "liger":
        return min(chunk_size(loss, vocab, impl), tokens)
    return min(tokens, 1 << (math.ceil(tokens / math.ceil(vocab / hidden)) - 1).bit_length())


def states(parameters: int, *, stage: int, ranks: int, size: int, bucket: int) -> dict[str, int]:
    """Bytes a rank holds for `parameters` under ZeRO `stage` (arXiv 1910.02054) in Sieve's settings of DeepSpeed: weights,
    fp32 masters (stage 0: the weights are), gradients accumulated in fp32, Adam's two moments in fp32; bucket: elements
    that are reduced at once; gathered: weights that stage 3 has collected, at most. At stage 1 DeepSpeed's optimizer for
    bf16 (size 2) keeps all gradients, the one for fp32 a part; that at stage 2 keeps a part beside what it is added to.
    What a parameter larger than the bucket takes more is left out."""
    part, rounded = math.ceil(parameters / ranks), size < FLOAT
    gradients = parameters if stage == 0 or rounded and stage == 1 else part
    if stage == 2 and not rounded:
        gradients *= 2
    buckets = FLOAT * bucket if stage == 3 else FLOAT * min(bucket, parameters) if stage and ranks > 1 else 0
    return {
        "weights": size * (part if stage == 3 else parameters),
        "masters": FLOAT * part if stage else 0,
        "gradients": FLOAT * gradients,
        "moments": 2 * FLOAT * (part if stage else parameters),
        "buckets": buckets,
        "gathered": size * min(parameters, GATHERED) if stage == 3 and ranks > 1 else 0,
    }


def growing(parameters: int, *, stage: int, ranks: int, size: int) -> int:
    """Bytes that come in the course of the backward, while what the forward kept goes: gradients in the weights' own
    type, which stage 1 adds to those in fp32 at the end, and the buffer in which stages 0 and 1 reduce between ranks."""
    rounded = size * parameters if stage == 1 and size < FLOAT else 0
    whole = stage == 0 or bool(rounded)
    return rounded + (FLOAT * min(parameters, REDUCED_AT_ONCE) if whole and ranks > 1 else 0)
