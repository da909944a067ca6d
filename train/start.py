"""Where a run's weights come from when they are not drawn: another model's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sieve.eval.load import first_names, folder_config
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.decoder import Decoder
from sieve.model.init import initial_value
from sieve.train.config import RunConfig
from sieve.train.schema import shown

log = logging.getLogger(__name__)

# Of model.*, what no forward depends on: how weights are drawn and experts kept busy.
_FREE = {"model.name", "model.init_std"} | {f"model.moe.{key}" for key in (
    "balance", "bias_update", "bias_update_rate", "bias_tokens", "bias_settle", "aux_coef", "z_loss_coef", "impl"
)}
# Of NSA, what phi and the gates were trained for, and how much is selected, which one may want to change.
_TRAINED = ("kernel_size", "kernel_stride", "phi", "compressed_rope")
_SELECTED = ("block_size", "topk", "init_blocks", "local_blocks", "window_size", "dense_len")


def weights_of(folder: Path, config: RunConfig, vocab_size: int) -> Callable[[str, torch.Size], Tensor]:
    """The initial value, fp32, of a parameter or buffer by name and shape: from `folder` (exported by sieve, or a Llama or
    Qwen3 model), and drawn by the run's seed for what that model has not (see sieve.model.llama.source_of).

    ValueError, naming each key with both values, where the folder's config.json describes another model than the run's; its
    vocabulary first, since it is the likeliest mistake. ValueError, naming tensors, where its weights are not those of its
    config.json, and where the run has no place for some. Another NSA pattern (topk, say) is warned of.
    """
    from sieve.model.llama import folder_weights, source_name, source_of

    if not folder.is_dir():
        raise ValueError(f"init={folder} is no folder; give one with config.json and .safetensors files")
    theirs = folder_config(folder)
    if theirs.vocab_size != vocab_size:
        raise ValueError(
            f"init={folder} has a vocabulary of {theirs.vocab_size}, the tokenizer one of {vocab_size}; give its own with "
            "tokenizer.path"
        )
    model, attention = _parts(folder, theirs)
    _compare(folder, config, model, attention)
    weights = folder_weights(folder, tied=model.tie_embeddings)
    _check_whole(folder, _shapes(model, attention, vocab_size), weights, own=theirs.model_type == "sieve")
    used = set()
    for name, shape in _shapes(config.model, config.attention, vocab_size).items():
        try:
            used.add(source_name(name, shape, weights))
        except ValueError as error:
            raise ValueError(f"init={folder}: {error}; attention.* must suit what that model has") from error
    if unused := weights.keys() - used:
        raise ValueError(
            f"init={folder} has {len(unused)} tensors that the run has no place for ({first_names(unused)}); choose "
            f"attention.* as that model has it: {_settings(attention)}"
        )

    def initial(name: str, shape: torch.Size) -> Tensor:
        source = source_of(name, shape, weights)
        return initial_value(name, shape, config.model, config.seed) if source is None else source.float()

    return initial


def _parts(folder: Path, theirs: Any) -> tuple[ModelConfig, AttentionConfig]:
    from sieve.model.llama import parts_of

    if theirs.model_type == "sieve":
        return theirs.model_config, theirs.attention_config
    try:
        return parts_of(theirs)
    except ValueError as error:
        raise ValueError(f"init={folder}: {error}") from error


def _shapes(model: ModelConfig, attention: AttentionConfig, vocab_size: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in Decoder(model, attention, vocab_size).state_dict().items()}


def _check_whole(folder: Path, shapes: dict[str, torch.Size], weights: dict[str, Tensor], *, own: bool) -> None:
    """ValueError unless `weights` are what the folder's model is made of; own: under our names."""
    from sieve.model.llama import their_name

    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:  # in older Llamas; follows from theta
        del weights[name]
    wanted = shapes if own else {their_name(name): shape for name, shape in shapes.items()}
    shared = wanted.keys() & weights.keys()
    other = [(name, weights[name].shape, wanted[name]) for name in shared if weights[name].shape != wanted[name]]
    kinds = {"missing": wanted.keys() - weights, "unexpected": weights.keys() - wanted, "of another shape": other}
    wrong = [f"{len(found)} {kind} ({first_names(found)})" for kind, found in kinds.items() if found]
    if wrong:
        raise ValueError(f"init={folder}: its weights are not those of its config.json: {', '.join(wrong)}")


def _compare(folder: Path, config: RunConfig, model: ModelConfig, attention: AttentionConfig) -> None:
    """ValueError where the run's model is another one; a warning where only its NSA selects otherwise."""
    found = list(_differing("model", config.model.model_dump(mode="json"), model.model_dump(mode="json")))
    if model.rope.scaling is None and config.model.rope.scaling is not None:  # one may want to stretch it, none may want less
        log.warning("init=%s is stretched by model.rope.scaling=%s", folder, shown(config.model.rope.scaling.model_dump()))
        found = [pair for pair in found if pair[0] != "model.rope.scaling"]
    both = not found and all("nsa" in own.layer_types(model.num_layers) for own in (config.attention, attention))
    keys = ("qk_norm", *(_TRAINED if both else ()))
    found += _attention(config.attention, attention, keys)
    if found:
        told = ((key, shown(mine), shown(their)) for key, mine, their in found)
        lines = [f"{key}={mine}: that model has {their}; give {key}={their}" for key, mine, their in told]
        raise ValueError("\n".join([f"init={folder} is another model than the run's:", *lines]))
    for key, ours, theirs in _attention(config.attention, attention, _SELECTED) if both else ():
        log.warning("init=%s was trained with %s=%s, this run has %s", folder, key, shown(theirs), shown(ours))


def _attention(ours: AttentionConfig, theirs: AttentionConfig, keys: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    pairs = ((key, getattr(ours, key), getattr(theirs, key)) for key in keys)
    return ((f"attention.{key}", mine, their) for key, mine, their in pairs if mine != their)


def _differing(path: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            yield from _differing(f"{path}.{key}", ours[key], theirs[key])
    elif ours != theirs and path not in _FREE:
        yield path, ours, theirs


def _settings(attention: AttentionConfig) -> str:
    """As overrides, what decides which weights a model's attention has."""
    kinds = f"layers={shown(attention.layers)}" if attention.layers else f"type={attention.type}"
    rest = {key: getattr(attention, key) for key in ("output_gate", "share_kv", "phi")}
    return " ".join(f"attention.{part}" for part in (kinds, *(f"{key}={shown(value)}" for key, value in rest.items())))
