"""What became of a step: worked out on the device, read by the host when it has to know, or a step later.

On a GPU the host would otherwise stand still at the end of every step until all of it is computed, and the GPU then until
the host has launched the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sieve.data.loader import Step
from sieve.train.guard import Guard
from sieve.train.skipped import write_skipped
from sieve.train.state import RunState


@dataclass
class Outcome:
    """Of step `number`, made of `step` at the learning rate `lr`. before: the loader's state that makes it again. record:
    its metrics, None if it is not logged. values: on the host, fp64: cross entropy summed, whether the step was skipped,
    gradient norm; they are there when `ready` has come (None: they are)."""

    number: int
    step: Step
    before: dict[str, Any] | None
    lr: float
    record: dict[str, Any] | None
    values: Tensor
    ready: torch.cuda.Event | None = None

    def read(self) -> tuple[float, bool, float]:
        """Loss, whether it was skipped, gradient norm."""
        if self.ready is not None:
            self.ready.synchronize()
        total, skipped, norm = self.values.tolist()
        return total / self.step.labelled, bool(skipped), norm


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`values` on the host, and what to wait for before they are read."""
    if values.device.type != "cuda":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return copy, ready


class Ledger:
    """Takes outcomes in their order and judges them: at once, or with `lag` one step later unless asked to.

    Until a step is judged, `run` knows nothing of its loss: neither the guard's state nor whether the run has to end.
    """

    def __init__(self, guard: Guard, lag: bool) -> None:
        self.guard, self.lag = guard, lag
        self._open: list[Outcome] = []

    def add(self, run: RunState, outcome: Outcome, now: bool) -> None:
        """`outcome` of the step that `run` has just made. now: judge all that is open."""
        self._open.append(outcome)
        while self._open and (now or not self.lag or len(self._open) > 1 or run.failure is not None):
            self._judge(run, self._open.pop(0))

    def _judge(self, run: RunState, outcome: Outcome) -> None:
        guard, step = self.guard, outcome.step
        loss, skipped, norm = outcome.read()
        why = guard.judge(loss, norm if skipped else 0.0, skipped)
        run.guard = guard.state
        if why is not None:
            write_skipped(run, outcome.number, step, why, loss, norm, outcome.before)
        if guard.gives_up and run.failure is None:
            run.failure = (
                f"steps {outcome.number - run.config.guard.max_in_a_row + 1} to {outcome.number}: the loss is {loss}, with a "
                f"gradient norm of {norm} and optim.lr={outcome.lr:g}; none of them has touched the weights, and the state "
                "is saved. Lower optim.lr, or lengthen schedule.warmup"
            )
        if outcome.record is not None:
            outcome.record |= {
                "train/loss": loss, "train/grad_norm": norm, "train/lr": outcome.lr,
                "train/skipped": guard.state["skipped"], "data/tokens_hash": step.state["hash"], "data/epoch": step.epoch,
                **step.metrics,
            }
