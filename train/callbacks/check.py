"""Checks that a run makes of itself as it goes: equal weights on all ranks, and the attention kernels' results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    from sieve.train.selfcheck import AttentionCheck
    from sieve.train.state import RunState

log = logging.getLogger(__name__)


class CheckConfig(Config):
    parity_every: int = Field(0, ge=0, description="steps from one comparison of the ranks' weights to the next; 0: never")
    attention_every: int = Field(0, ge=0, description="steps from one look at an attention layer to the next; 0: never")
    attention_tokens: int = Field(2048, gt=0, description="first tokens of a micro-batch that are computed again")
    attention_limit: float = Field(0.05, gt=0, description="relative error of the layer's output that is warned of")


class Parity(Callback):
    """Calls `check()`, which raises when ranks differ, every `every` steps."""

    def __init__(self, every: int, check: Callable[[], int]) -> None:
        self.every, self.check = every, check

    def step(self, run: RunState, record: dict | None) -> None:
        if self.every and run.step % self.every == 0:
            self.check()


class SelfCheck(Callback):
    """Every `attention_every` steps one layer, each in its turn, computes its first tokens by the reference too:
    writes `check/attention_error` (see AttentionCheck.error; the largest of all ranks) and `check/attention_layer`."""

    def __init__(self, config: CheckConfig, check: AttentionCheck) -> None:
        self.config, self.check = config, check

    def start(self, run: RunState) -> None:
        self._prepare(run)

    def step(self, run: RunState, record: dict | None) -> None:
        if not self._due(run.step):
            self._prepare(run)
            return
        layer, error = self.check.layer, self.check.error()
        self._prepare(run)
        if not error <= self.config.attention_limit:
            log.warning(
                "step %d: layer %d's attention differs by %.2g from the reference, more than check.attention_limit=%g",
                run.step, layer, error, self.config.attention_limit,
            )
        if record is not None:
            record["check/attention_error"], record["check/attention_layer"] = error, layer

    def _due(self, step: int) -> bool:
        return self.config.attention_every > 0 and step > 0 and step % self.config.attention_every == 0

    def _prepare(self, run: RunState) -> None:
        if self._due(run.step + 1):
            self.check.watch((run.step + 1) // self.config.attention_every - 1)
