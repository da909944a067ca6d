"""A model with its tokenizer, ready for use, from a folder in the transformers layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from sieve.data.tokenizer import Encoder, Tokenizer
from sieve.eval.perplexity import token_bytes
from sieve.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Text:
    """encode: text to ids without bos; decode: ids to text. bytes_of: int64 [vocab], UTF-8 bytes of text a token stands
    for, or None where the tokenizer cannot say. bos_id and eos_id: None where there is none."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos_id: int | None
    eos_id: int | None
    bytes_of: Tensor | None

    @classmethod
    def of(cls, tokenizer: Encoder) -> Text:
        return cls(
            lambda text: tokenizer.encode([text])[0].tolist(), tokenizer.decode, tokenizer.bos_id, tokenizer.eos_id,
            token_bytes(tokenizer.model),
        )

    def prompt(self, text: str) -> list[int]:
        """Ids of a text from its beginning on, as in training."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)


@dataclass(frozen=True)
class Loaded:
    """name: for reports. seq_len: tokens of the training rows, None where unknown."""

    name: str
    decoder: Decoder
    text: Text | None
    seq_len: int | None


def place_and_precision(device: Literal["auto", "cpu", "cuda"], dtype: Literal["auto", "fp32", "bf16"]) -> tuple:
    """torch's device and dtype; auto: a GPU where there is one, and there bf16. ValueError when there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here; use device=cpu")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype)
    return place, chosen or (torch.bfloat16 if place.type == "cuda" else torch.float32)


def folder_config(path: Path) -> PreTrainedConfig:
    """transformers' config of a folder with a config.json of model_type sieve, llama or qwen3; ValueError for another."""
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no exported model: config.json: {error}") from error
    if kind not in ("sieve", "llama", "qwen3"):
        raise ValueError(f"{path} holds a model of type {kind}; sieve, llama and qwen3 can be read")
    from transformers import AutoConfig

    import sieve.model.hf  # noqa: F401  (registers the type)

    return AutoConfig.from_pretrained(path)


def load_folder(path: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    """An exported folder: config.json of model_type sieve, llama or qwen3, weights, and a tokenizer if there is one.

    ValueError, with what is missing, when `path` is none, and when its weights are not exactly those of its config.json.
    """
    config = folder_config(path)
    from transformers import AutoModelForCausalLM

    # transformers would draw what is missing and pass over the rest; a tied head is none of either.
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: its weights cannot be read: {error}") from error
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
    wrong = [f"{len(info[key])} {kind} ({first_names(info[key])})" for key, kind in kinds.items() if info[key]]
    if wrong:
        raise ValueError(f"{path}: its weights are not those of its config.json: {', '.join(wrong)}; export or copy it again")
    if config.model_type == "sieve":
        decoder = model.model
    else:
        from sieve.model.llama import from_llama

        decoder = from_llama(model)
    return Loaded(
        path.name, decoder.to(device).eval().requires_grad_(False), load_tokenizer(path), config.max_position_embeddings
    )


def first_names(tensors: Collection[str | tuple]) -> str:
    """The first few of `tensors`, names or tuples (name, shape there, shape wanted), for a message."""
    told = [each if isinstance(each, str) else f"{each[0]} {list(each[1])}, not {list(each[2])}" for each in sorted(tensors)]
    return ", ".join(told[:4]) + ", ..." * (len(told) > 4)


def load_tokenizer(path: Path) -> Text | None:
    """The tokenizer in a folder: SentencePiece's own file, else transformers'; None when there is neither."""
    if (path / Tokenizer.FILE).is_file():
        return Text.of(Tokenizer.load(path / Tokenizer.FILE))
    if not (path / "tokenizer_config.json").is_file() and not (path / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path)
    return Text(
        lambda text: theirs.encode(text, add_special_tokens=False),
        lambda ids: theirs.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False),
        theirs.bos_token_id, theirs.eos_token_id, None,
    )
