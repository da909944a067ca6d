"""Where a run stands: what callbacks see of it, and the random generators that have to go on where they were."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sieve.train.config import RunConfig


@dataclass
class RunState:
    """Changed by the training loop alone.

    step, tokens: done so far, tokens by all ranks together. tokens_before: of them, those of another text that the run
    began with, which the loader's state does not count. model_flops: training FLOPs per token by part.
    data: the loader's state after `step`. resumed_from: the step of the checkpoint that this process began with.
    evaluated_step: the last step with an evaluation. stopping: whether the run ends after this step, unfinished.
    failure: why it cannot go on after this step, else None. save_requested: whether somebody wants a checkpoint of it.
    guard: of sieve.train.guard, None before the first step. validation: the validation text's id by source.
    health, step_load, router_bias: of the last logged step, see DecoderOutput; means and sums over the global batch.
    expert_load: the sum of the loads of all steps since the one logged before it. load_since: of the steps after it.
    """

    config: RunConfig
    directory: Path
    rank: int
    world_size: int
    total_steps: int
    model_flops: dict[str, float]
    step: int = 0
    tokens: int = 0
    tokens_before: int = 0
    data: dict[str, Any] | None = None
    resumed_from: int | None = None
    wandb_id: str | None = None
    evaluated_step: int = 0
    stopping: bool = False
    failure: str | None = None
    save_requested: bool = False
    guard: dict[str, Any] | None = None
    validation: dict[str, str] = field(default_factory=dict)
    health: dict[str, Tensor] = field(default_factory=dict)
    expert_load: dict[int, Tensor] = field(default_factory=dict)
    load_since: dict[int, Tensor] = field(default_factory=dict)
    step_load: dict[int, Tensor] = field(default_factory=dict)
    router_bias: dict[int, Tensor] = field(default_factory=dict)

    @property
    def phase(self) -> int:
        """The index of the last step's phase."""
        return 0 if self.data is None else self.data["phase"]

    @property
    def ending(self) -> bool:
        """Whether no step follows, although the run is not finished."""
        return self.stopping or self.failure is not None


def random_state() -> dict[str, Any]:
    """Every generator's state in this process, in types that torch.load reads with weights_only."""
    kind, words, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), next_gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Let the generators go on from `random_state`'s result; CUDA's only where there is CUDA."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
