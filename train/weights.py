"""The weights of a training checkpoint, without an engine: for use and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.train.checkpoint import Saved

_FILE = "mp_rank_00_model_states.pt"


def module_weights(saved: Saved) -> dict[str, Tensor]:
    """The Decoder's state dict in `saved`, on the CPU, in the run's dtype. ValueError where ranks hold parts of it."""
    if saved.manifest["config"]["zero"]["stage"] == 3:
        raise ValueError(f"{saved.path} was saved with zero=3, in which every process holds a part; export it first")
    try:
        return torch.load(saved.path / _FILE, map_location="cpu", weights_only=True)["module"]
    except (OSError, KeyError) as error:
        raise ValueError(f"{saved.path} has no weights: {_FILE}: {error}") from error
