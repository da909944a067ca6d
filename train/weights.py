"""The weights of a training checkpoint, without an engine: for use, evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sieve.train.checkpoint import Saved
from sieve.train.config import RunConfig
from sieve.train.partition import WEIGHT
from sieve.train.phases import ropes
from sieve.train.shards import ShardReader

TIED, SOURCE = "head.weight", "embed.weight"


class SavedWeights:
    """The Decoder's parameters and buffers in `saved`, one at a time, whoever held which part of them.

    config: the run's, as it was written. rope, seq_len: of the phase that the checkpoint is from. names: in the model's order,
    a tied head not among them. Parameters come in `dtype` (None: the run's), rounded from
    the fp32 master weights as training itself rounds them; buffers as they are.
    """

    def __init__(self, saved: Saved, dtype: torch.dtype | None = None) -> None:
        manifest = saved.manifest
        self.config: dict[str, Any] = manifest["config"]
        config = RunConfig.of(self.config)
        self.rope = ropes(config.model.rope, config.phases)[saved.phase]
        self.seq_len = config.phases[saved.phase].seq_len
        self.dtype = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config["dtype"]]
        self.tied: bool = self.config["model"]["tie_embeddings"]
        self._shapes: dict[str, list[int]] = manifest["parameters"]
        self._buffers = set(manifest["buffers"])
        self._reader = ShardReader(saved.path)

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def layout(self, name: str) -> tuple[torch.dtype, list[int]]:
        """dtype and shape of a tensor, without reading it."""
        if name in self._buffers:
            return self._reader.buffer(name).dtype, self._shapes[name]
        return self.dtype, self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._buffers:
            return self._reader.buffer(name)
        size = torch.Size(self._shapes[name])
        return self._reader.read(WEIGHT, name, 0, size.numel()).to(self.dtype).view(size)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self[name]


def module_weights(saved: Saved) -> dict[str, Tensor]:
    """The Decoder's state dict in `saved`, on the CPU, in the run's dtype. ValueError where the files lack a part."""
    weights = SavedWeights(saved)
    state = dict(weights.items())
    if weights.tied:
        state[TIED] = state[SOURCE]
    return state
