"""Full-attention dense decoders as plain Llama, or Qwen3 where they have QK-norm, and back: one model, two sets of names.

With them a trained model runs wherever Llama runs, and a public one can be continued here, with NSA too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sieve.model.config import AttentionConfig, ModelConfig, RopeConfig, RopeScaling
from sieve.model.decoder import Decoder
from sieve.model.init import initialize

_OURS = {
    "embed.": "model.embed_tokens.", "norm.": "model.norm.", "head.": "lm_head.", "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.", "attention.": "self_attn.",
}


def their_name(name: str) -> str:
    """layers.0.attention.q_proj.weight -> model.layers.0.self_attn.q_proj.weight"""
    layer = re.match(r"layers\.\d+\.", name)
    rest = name[layer.end() :] if layer else name
    part = next((ours for ours in _OURS if rest.startswith(ours)), "")
    rest = _OURS.get(part, "") + rest[len(part) :]
    return f"model.{layer[0]}{rest}" if layer else rest


def why_not_llama(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """The reason why Llama and Qwen3 cannot hold such a model; None when one of them can."""
    kinds = sorted(set(attention.layer_types(model.num_layers)) - {"full"})
    if kinds:
        return f"it has layers of attention={', '.join(kinds)}; Llama has full attention alone"
    if model.moe is not None:
        return "it has experts (model.moe)"
    if attention.output_gate:
        return "it has output gates (attention.output_gate=true)"
    if model.head_dim_qk != model.head_dim_v:
        return f"model.head_dim_qk={model.head_dim_qk} is not model.head_dim_v={model.head_dim_v}"
    return None


def to_llama(decoder: Decoder, *, max_position_embeddings: int, **kwargs: Any) -> PreTrainedModel:
    """A LlamaForCausalLM, or Qwen3ForCausalLM with QK-norm, of the decoder's weights (copied) and dtype.

    kwargs: of their config, such as bos_token_id and eos_token_id. ValueError, with the reason, for a decoder of which
    neither can be made; SieveForCausalLM holds them all.
    """
    config, attention = decoder.config, decoder.attention_config
    reason = why_not_llama(config, attention)
    if reason is not None:
        raise ValueError(f"{config.name} cannot be a Llama: {reason}; save it as SieveForCausalLM")
    qwen = attention.qk_norm
    made = (Qwen3Config if qwen else LlamaConfig)(
        vocab_size=decoder.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim_qk, rms_norm_eps=config.norm_eps,
        rope_parameters=_their_rope(config.rope), tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=max_position_embeddings, dtype=decoder.embed.weight.dtype, **kwargs,
    )
    with torch.device("meta"):
        theirs = (Qwen3ForCausalLM if qwen else LlamaForCausalLM)(made)
    theirs = theirs.to(decoder.embed.weight.dtype).to_empty(device=decoder.embed.weight.device)
    theirs.load_state_dict({their_name(name): value for name, value in decoder.state_dict().items()}, strict=True)
    theirs.tie_weights()
    # Buffers that no file holds were lost with the meta device.
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(made).to(decoder.embed.weight.device)
    return theirs.eval()


def from_llama(theirs: PreTrainedModel, attention: AttentionConfig | None = None, *, seed: int = 0) -> Decoder:
    """The decoder of a LlamaForCausalLM or Qwen3ForCausalLM, its weights copied, in its dtype.

    attention: how it shall attend (None: as it did, fully); qk_norm follows from the model. Layers of another type than
    full keep every projection they share by name; NSA's compression and window branches begin with the selection's K and
    V projections (and K norm), gates and phi as initialize(seed) draws them. ValueError for a model that is of neither
    kind or uses what the decoder has not.
    """
    model, own = parts_of(theirs.config)
    chosen = (attention or own).model_copy(update={"qk_norm": own.qk_norm})
    decoder = Decoder(model, chosen, theirs.config.vocab_size)
    initialize(decoder, seed)
    copy_weights(decoder, theirs.state_dict())
    return decoder.to(theirs.dtype)


def parts_of(config: PreTrainedConfig) -> tuple[ModelConfig, AttentionConfig]:
    """What a Llama's or Qwen3's config is in our words. ValueError for another type, and for what the decoder has not."""
    if config.model_type not in ("llama", "qwen3"):
        raise ValueError(f"a model of type {config.model_type} cannot be imported; llama and qwen3 can")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False) or config.hidden_act != "silu":
        raise ValueError("attention_bias, mlp_bias or an activation other than silu cannot be imported")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"sliding_window={config.sliding_window} in some layers cannot be imported")
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    model = ModelConfig(
        name=config.model_type, num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads, head_dim_qk=dim, head_dim_v=dim,
        intermediate_size=config.intermediate_size, rope=_our_rope(config.rope_parameters),
        norm_eps=config.rms_norm_eps, tie_embeddings=bool(config.tie_word_embeddings),
    )
    return model, AttentionConfig(type="full", qk_norm=config.model_type == "qwen3")


@torch.no_grad()
def copy_weights(decoder: Decoder, weights: dict[str, Tensor]) -> None:
    """Set what another model's `weights` give; see from_llama for the rest."""
    for name, value in decoder.named_parameters():
        source = source_of(name, value.shape, weights)
        if source is not None:
            value.copy_(source)


def source_of(name: str, shape: torch.Size, weights: dict[str, Tensor]) -> Tensor | None:
    """What the Decoder parameter `name` begins with when it goes on from `weights`, under the Decoder's or Llama's names:
    its own; for NSA's compression and window branches, where they are missing, the selection's; None, that is to be
    drawn, for gates and phi. ValueError where another shape or nothing is there."""
    found = source_name(name, shape, weights)
    return None if found is None else weights[found]


def source_name(name: str, shape: torch.Size, weights: dict[str, Tensor]) -> str | None:
    """The name in `weights` of what source_of gives."""
    branch = re.sub(r"\b(k|v)_(cmp|win)_", r"\1_", name)
    for known in (name, their_name(name), branch, their_name(branch)):
        if known in weights:
            if weights[known].shape != shape:
                raise ValueError(f"{known} is {list(weights[known].shape)}, {name} needs {list(shape)}")
            return known
    if name.endswith((".gate.weight", "output_gate.weight")) or "_phi." in name:
        return None
    raise ValueError(f"the model to go on from has no weights for {name} ({their_name(name)})")


def folder_weights(path: Path, *, tied: bool) -> dict[str, Tensor]:
    """All weights in a folder's safetensors files, on the CPU; a tied head under both names. ValueError without any."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} has no .safetensors file")
    weights = {name: value for file in files for name, value in load_file(file).items()}
    for head, embedding in (("head.weight", "embed.weight"), ("lm_head.weight", "model.embed_tokens.weight")):
        if tied and embedding in weights:
            weights[head] = weights[embedding]
    return weights


def _their_rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "yarn", "rope_theta": rope.theta, "factor": rope.scaling.factor,
        "original_max_position_embeddings": rope.scaling.original_seq_len, "beta_fast": rope.scaling.beta_fast,
        "beta_slow": rope.scaling.beta_slow,
    }


def _our_rope(parameters: dict[str, Any]) -> RopeConfig:
    kind = parameters.get("rope_type", "default")
    theta = parameters.get("rope_theta", RopeConfig().theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn" or parameters.get("attention_factor") or parameters.get("mscale"):
        raise ValueError(f"rope_parameters {parameters} cannot be imported; rope_type default and plain yarn can")
    plain = RopeScaling(factor=parameters["factor"], original_seq_len=parameters["original_max_position_embeddings"])
    known = {key: float(parameters[key]) for key in ("beta_fast", "beta_slow") if parameters.get(key) is not None}
    return RopeConfig(theta=theta, scaling=plain.model_copy(update=known))
