"""Sieve's decoder as a transformers model: importing this file registers it with AutoConfig and AutoModelForCausalLM.

A folder holds config.json (model_type "sieve"; `model` and `attention` as sieve.model.config has them), the weights in
safetensors under the Decoder's own names, and the tokenizer. Nothing else is needed to load it than sieve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from sieve.kernels.nsa.layout import Packing
from sieve.model.cache import Cache
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.decoder import Decoder
from sieve.model.head import Head
from sieve.model.init import initial_value

log = logging.get_logger(__name__)  # transformers' own, for its warning_once


class SieveConfig(PreTrainedConfig):
    """model, attention: what sieve.model.config.ModelConfig and AttentionConfig take. max_position_embeddings: tokens of
    the training rows, None where unknown. The usual names (hidden_size, num_hidden_layers, ...) can be read as well."""

    model_type = "sieve"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {}

    vocab_size: int | None = None
    model: dict | None = None
    attention: dict | None = None
    max_position_embeddings: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model is not None:
            self.tie_word_embeddings = self.model_config.tie_embeddings
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, model: ModelConfig, attention: AttentionConfig, vocab_size: int, **kwargs: Any) -> SieveConfig:
        """kwargs: bos_token_id, eos_token_id, pad_token_id, max_position_embeddings, dtype."""
        # Which kernels run is no property of the weights.
        attention = attention.model_copy(update={"impl": "auto"})
        return cls(
            vocab_size=vocab_size, model=model.model_dump(mode="json"), attention=attention.model_dump(mode="json"),
            architectures=["SieveForCausalLM"], **kwargs,
        )

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.model_validate(self._part("model"))

    @property
    def attention_config(self) -> AttentionConfig:
        return AttentionConfig.model_validate(self._part("attention"))

    def _part(self, name: str) -> dict:
        if getattr(self, name) is None:
            raise ValueError(f"config.json of a sieve model needs `{name}`; this one has none")
        return getattr(self, name)

    hidden_size = property(lambda self: self.model_config.hidden_size)
    intermediate_size = property(lambda self: self.model_config.intermediate_size)
    num_hidden_layers = property(lambda self: self.model_config.num_layers)
    num_attention_heads = property(lambda self: self.model_config.num_heads)
    num_key_value_heads = property(lambda self: self.model_config.num_kv_heads)
    head_dim = property(lambda self: self.model_config.head_dim_qk)


class SieveCache:
    """The decoder's cache under the names that transformers' generation calls."""

    is_compileable = False

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._seen = 0  # columns, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def take(self, columns: int, counts: list[int]) -> None:
        """Make room: what is there and half as much again, so that growing costs little on the whole."""
        self._seen += columns
        needed = self.cache.longest + max(counts)
        if needed > self.cache.capacity:
            self.cache.reserve(needed + needed // 2)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.select([row for row in range(self.cache.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.select(indices.tolist())

    def crop(self, max_length: int) -> None:
        raise ValueError("a window's places are overwritten: this cache cannot go back, so no assisted generation")


class SieveForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is the Decoder. Padding, at either side, is told by attention_mask and takes no part in anything; generate
    takes it at the left alone, since new tokens come after the last column."""

    config_class = SieveConfig
    config: SieveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}
    _keep_in_fp32_modules_strict = ["router.bias"]
    _supports_sdpa = True  # transformers' choice of attention plays no part here

    def __init__(self, config: SieveConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config.model_config, config.attention_config, config.vocab_size)
        if not config.tie_word_embeddings:
            self._tied_weights_keys = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Of a module's own parameters, those that no file has: drawn as in training, with seed 0."""
        names = self.__dict__.setdefault("_module_names", {id(m): name for name, m in self.model.named_modules()})
        prefix = names.get(id(module), "")
        if prefix == "head" and self.config.tie_word_embeddings:
            return
        for name, value in module.named_parameters(recurse=False):
            if not getattr(value, "_is_hf_initialized", False) and not value.is_meta:
                value.copy_(initial_value(f"{prefix}.{name}".strip("."), value.shape, self.model.config, 0))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers': the embedding and the head, tied or not, and what tells their size."""
        found = super().resize_token_embeddings(*args, **kwargs)
        self.model.vocab_size = self.config.vocab_size = found.num_embeddings
        return found

    def _get_resized_lm_head(self, old_lm_head: Head, new_num_tokens: int | None = None, **kwargs: Any) -> Head:
        # transformers resizes an nn.Linear alone; a tied head has its new size already, through the embedding.
        if new_num_tokens is None or len(old_lm_head.weight) == new_num_tokens:
            return old_lm_head
        linear = nn.Linear(old_lm_head.weight.shape[1], len(old_lm_head.weight), bias=False, device="meta")
        linear.weight = old_lm_head.weight
        old_lm_head.weight = super()._get_resized_lm_head(linear, new_num_tokens, **kwargs).weight
        return old_lm_head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers', after a look at the padding: what follows a row's last column would follow no token."""
        if attention_mask is not None and attention_mask.dim() == 2:
            ends = (attention_mask[:, -1] == 0) & (attention_mask != 0).any(1)  # a chunk may be padding alone
            if ends.any():
                raise ValueError(
                    f"attention_mask ends in padding in rows {ends.nonzero().flatten().tolist()}, and generate goes on after "
                    "the last column; pad on the left: tokenizer.padding_side='left'"
                )
        return super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def of(cls, decoder: Decoder, **kwargs: Any) -> SieveForCausalLM:
        """Around `decoder`, whose weights it shares. kwargs: of SieveConfig.of."""
        weight = decoder.embed.weight
        config = SieveConfig.of(decoder.config, decoder.attention_config, decoder.vocab_size, dtype=weight.dtype, **kwargs)
        with torch.device("meta"):
            made = cls(config)
        made.model = decoder
        return made.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers', with the Decoder's own names of weights."""
        weights = self.model.state_dict()
        if self.config.tie_word_embeddings:
            del weights["head.weight"]
        super().save_pretrained(save_directory, **({"state_dict": weights} | kwargs))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: SieveCache | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, return_dict: bool | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids int64 [B, n]; attention_mask [B, past + n], 0 = padding; logits [B, n, vocab] (meaningless at
        padding). Positions follow from the mask; position_ids may be given and have to agree. labels as input_ids, -100
        = none. A cache takes no gradient: use_cache applies to evaluation without labels under torch.no_grad() only, and
        a warning says so, once, where it is asked for elsewhere. ValueError for what this model cannot take or give."""
        B, n = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -n:]
        if mask.dim() != 2 or tuple(mask.shape) != (B, n):
            raise ValueError(f"attention_mask must be [{B}, past + {n}], got {list(attention_mask.shape)}")
        mask = mask.bool()
        counts = mask.sum(1).tolist()
        self._check_arguments(past_key_values, kwargs)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            if labels is None and not self.training and not torch.is_grad_enabled():
                past_key_values = SieveCache(self.model.new_cache(B, n))
            elif use_cache:
                log.warning_once(
                    "use_cache=True gives no past_key_values here: a cache takes no gradient; call the model under "
                    "torch.no_grad(), in eval() and without labels, or leave use_cache out"
                )
        self._check_positions(position_ids, mask, past_key_values)
        tokens = input_ids[mask]
        if past_key_values is not None:
            past_key_values.take(n, counts)
            hidden = self.model.extend_hidden(tokens, counts, past_key_values.cache)
        else:
            ends = torch.tensor([0, *counts], device=tokens.device).cumsum(0).int()
            hidden = self.model.hidden(tokens[None], Packing.of(ends, tokens.numel(), max(counts)))
        padded = hidden.new_zeros(B, n, hidden.shape[-1]).masked_scatter(mask[..., None], hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        padded = padded[:, kept]
        logits = self.model.head(padded.flatten(0, 1)).unflatten(0, padded.shape[:2])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return out.to_tuple() if return_dict is False else out

    def _check_arguments(self, past: Any, more: dict[str, Any]) -> None:
        if more.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds cannot be given; pass input_ids")
        if past is not None and not isinstance(past, SieveCache):
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, which cannot hold NSA's keys; leave it out, or pass "
                "SieveCache(model.model.new_cache(batch, tokens)) of sieve.model.hf"
            )
        for name in ("output_hidden_states", "output_attentions"):
            given = more.get(name)
            if getattr(self.config, name, False) if given is None else given:
                raise ValueError(f"{name}=True: this model keeps none to give; leave it out")

    def _check_positions(self, position_ids: Tensor | None, mask: Tensor, past: SieveCache | None) -> None:
        if position_ids is None:
            return
        own = mask.long().cumsum(1) - 1
        if past is not None:
            own = own + past.cache.lengths.long()[:, None]
        if not torch.equal(own[mask], position_ids.expand_as(mask)[mask].long()):
            raise ValueError("position_ids do not count the tokens that attention_mask keeps; leave them out")


AutoConfig.register(SieveConfig.model_type, SieveConfig)
AutoModelForCausalLM.register(SieveConfig, SieveForCausalLM)
