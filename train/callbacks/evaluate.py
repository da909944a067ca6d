"""When the validation loss is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from sieve.eval.config import NeedleConfig, RecallConfig, SyntheticTask
from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    from sieve.train.state import RunState


Evaluation = Callable[["RunState", Callable[[], None]], dict[str, float] | None]


class EvalConfig(Config):
    every: int = Field(200, ge=0, description="steps from one evaluation to the next, and at the end; 0: never")
    rows: int | None = Field(64, gt=0, description="rows of seq_len tokens of the validation text; null: all of it")
    tasks: tuple[SyntheticTask, ...] = Field((), description="synthetic tasks measured along with the loss")
    needle: NeedleConfig = NeedleConfig()
    recall: RecallConfig = RecallConfig()


class Evaluate(Callback):
    """Evaluates by `evaluate(run, alive)`, which returns eval/* metrics, every `every` steps and at the last one. It calls
    `alive()` as it goes, and returns None when it was cut short because the run is to stop.

    A run that is told to stop saves at once and owes an evaluation that falls on that step: it is made up for when
    the run goes on, with the same weights. Hence also `run.evaluated_step`, which the checkpoints carry.
    """

    def __init__(self, config: EvalConfig, evaluate: Evaluation, listeners: Callback) -> None:
        self.config, self.evaluate, self.listeners = config, evaluate, listeners

    def start(self, run: RunState) -> None:
        if 0 < run.step != run.evaluated_step and self._due(run):
            self._evaluate(run)

    def step(self, run: RunState, record: dict | None) -> None:
        if self._due(run) and not run.ending:
            self._evaluate(run)

    def _due(self, run: RunState) -> bool:
        return self.config.every > 0 and (run.step % self.config.every == 0 or run.step == run.total_steps)

    def _evaluate(self, run: RunState) -> None:
        metrics = self.evaluate(run, lambda: self.listeners.waiting(run))
        if metrics is None:
            run.stopping = True
            return
        record = {"step": run.step, "tokens": run.tokens, **metrics}
        run.evaluated_step = run.step
        self.listeners.evaluated(run, record)
