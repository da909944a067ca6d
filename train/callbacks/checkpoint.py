"""When a run is saved: every so many steps, when it is asked to, at its end, and when it is told to stop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pydantic import Field

from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    from sieve.train.saver import Done, Saver
    from sieve.train.state import RunState

log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    every: int = Field(200, ge=0, description="steps from one checkpoint to the next; 0: only at the end of the run")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of so many steps are kept for good; 0: none")
    background: bool = Field(True, description="write while training goes on; false: training waits for the disk")
    patience: float = Field(
        300.0, gt=0, description="seconds to wait for an earlier save that still runs; after them this one is left out"
    )

    def due(self, step: int) -> bool:
        """Whether a checkpoint of `step` is made by the calendar."""
        return self.every > 0 and step % self.every == 0


class SaveFailed(RuntimeError):
    """The state at the end of a run could not be saved."""


class Checkpoint(Callback):
    """Saves by `saver` and tells `listeners` of it.

    Stands last among the callbacks: what is logged and evaluated at a step is on the disk before its checkpoint. A save
    that fails is told of, and training goes on; raises SaveFailed when it is the one at the end.
    """

    def __init__(self, config: CheckpointConfig, saver: Saver, listeners: Callback) -> None:
        self.config, self.saver, self.listeners = config, saver, listeners

    def start(self, run: RunState) -> None:
        self.saver.prepare()

    def step(self, run: RunState, record: dict | None) -> None:
        if self.saver.pending:
            self._ended(run, self.saver.poll())
        last = run.ending or run.step == run.total_steps
        due = self.config.due(run.step) or run.save_requested
        if not (due or last):
            return
        if self.saver.pending and not self._wait(run, None if last else self.config.patience):
            log.warning(
                "no checkpoint is made of step %d: the one before is still being written after %.0f s; training goes on. "
                "Give checkpoint.every more steps, or a faster disk", run.step, self.config.patience,
            )
            return
        self.saver.begin(run)
        self.listeners.saving(run)
        if last or not self.config.background:
            done = self._wait(run, None)
            if last and done is not None and done.path is None:
                raise SaveFailed(
                    f"the state of step {run.step} could not be saved: {done.problem}; the checkpoints before it stand"
                )

    def end(self, run: RunState, status: str) -> None:
        if status != "failed":  # or ranks might wait for each other; what is half-written is removed at the next start
            if self.saver.pending:
                self._wait(run, None)
            self.saver.close()

    def _wait(self, run: RunState, patience: float | None) -> Done | None:
        done = self.saver.wait(patience, lambda: self.listeners.waiting(run))
        self._ended(run, done)
        return done

    def _ended(self, run: RunState, done: Done | None) -> None:
        if done is None:
            return
        if done.path is not None:
            self.listeners.saved(run, done)
        else:
            log.warning(
                "the checkpoint of step %d could not be written: %s; training goes on, the checkpoints before it stand",
                done.step, done.problem,
            )
