"""Where a run's weights come from when they are not drawn: another model's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sieve.model.init import initial_value
from sieve.train.config import RunConfig


def weights_of(folder: Path, config: RunConfig, vocab_size: int) -> Callable[[str, torch.Size], Tensor]:
    """The initial value, fp32, of a parameter by name and shape: from `folder` (exported by sieve, or a Llama or Qwen3
    model), and drawn by the run's seed for what that model has not (see sieve.model.llama.source_of).

    ValueError, naming the parameter, where shapes differ; the vocabulary's first, since it is the likeliest mistake.
    """
    from sieve.model.llama import folder_weights, source_of

    if not folder.is_dir():
        raise ValueError(f"init={folder} is no folder; give one with .safetensors files")
    weights = folder_weights(folder)
    embedding = next((weights[name] for name in ("embed.weight", "model.embed_tokens.weight") if name in weights), None)
    if embedding is not None and embedding.shape[0] != vocab_size:
        raise ValueError(
            f"init={folder} has a vocabulary of {embedding.shape[0]}, the tokenizer one of {vocab_size}; give its own with "
            "tokenizer.path"
        )

    def initial(name: str, shape: torch.Size) -> Tensor:
        try:
            source = source_of(name, shape, weights)
        except ValueError as error:
            raise ValueError(f"init={folder}: {error}; model.* must be as that model is") from error
        return initial_value(name, shape, config.model, config.seed) if source is None else source.float()

    return initial
