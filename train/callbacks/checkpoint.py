"""When a run is saved: every so many steps, at its end, and when it is told to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    from sieve.train.state import RunState


class CheckpointConfig(Config):
    every: int = Field(200, ge=0, description="steps from one checkpoint to the next; 0: only at the end of the run")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")


class Checkpoint(Callback):
    """Saves by `save(run)`, which returns the finished checkpoint's path, and tells `listeners` of it.

    Stands last among the callbacks: what is logged and evaluated at a step is on the disk before its checkpoint.
    """

    def __init__(self, config: CheckpointConfig, save: Callable[[RunState], Path], listeners: Callback) -> None:
        self.config, self.save, self.listeners = config, save, listeners

    def step(self, run: RunState, record: dict | None) -> None:
        due = self.config.every and run.step % self.config.every == 0
        if due or run.stopping or run.step == run.total_steps:
            self.listeners.saved(run, self.save(run))
