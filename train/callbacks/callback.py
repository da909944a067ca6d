"""The hooks that whatever watches a run implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sieve.train.saver import Done
    from sieve.train.state import RunState


class Callback:
    """Called on every rank, in the order of the list; a callback that writes does so on rank 0 only."""

    def start(self, run: RunState) -> None:
        """Before the first step of this process; `run.step` is where it goes on from."""

    def step(self, run: RunState, record: dict | None) -> None:
        """After every step. record: its metrics, which a callback may add to, or None when the step is not logged."""

    def evaluated(self, run: RunState, record: dict) -> None:
        """After an evaluation, which follows the step's own `step`. record: step, tokens and eval/*."""

    def saving(self, run: RunState) -> None:
        """After the state has been copied for a checkpoint, before the training goes on."""

    def saved(self, run: RunState, done: Done) -> None:
        """After a checkpoint is complete at `done.path`, which may be steps after the one it is of."""

    def waiting(self, run: RunState) -> None:
        """Again and again while an evaluation or a slow save keeps the steps from going on."""

    def end(self, run: RunState, status: str) -> None:
        """At the end, also of a run that fails. status: finished, stopped (by a signal) or failed."""


class Callbacks(Callback):
    """Several as one, in their order."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def start(self, run: RunState) -> None:
        for callback in self.callbacks:
            callback.start(run)

    def step(self, run: RunState, record: dict | None) -> None:
        for callback in self.callbacks:
            callback.step(run, record)

    def evaluated(self, run: RunState, record: dict) -> None:
        for callback in self.callbacks:
            callback.evaluated(run, record)

    def saving(self, run: RunState) -> None:
        for callback in self.callbacks:
            callback.saving(run)

    def saved(self, run: RunState, done: Done) -> None:
        for callback in self.callbacks:
            callback.saved(run, done)

    def waiting(self, run: RunState) -> None:
        for callback in self.callbacks:
            callback.waiting(run)

    def end(self, run: RunState, status: str) -> None:
        for callback in self.callbacks:
            callback.end(run, status)
