"""Which steps are skipped: losses and gradients that are no numbers, and, on request, spikes of the loss."""

from __future__ import annotations

import math
import statistics
from typing import Any

from pydantic import Field

from sieve.model.config import Config


class GuardConfig(Config):
    """A step whose loss or gradient is not finite never touches the weights; these say what else is skipped and when
    the run gives up."""

    max_in_a_row: int = Field(5, ge=1, description="skipped steps in a row after which the run is saved and stops")
    spikes: bool = Field(False, description="skip a step whose loss is far above the last ones")
    spike_sigma: float = Field(6.0, gt=0, description="standard deviations above the mean that make a spike")
    spike_window: int = Field(128, ge=8, description="steps that the mean and the deviation are taken over")


class Guard:
    """Judges losses as they come. `state` is JSON-able and travels in the checkpoints:

    skipped: steps so far, spikes: those of them with finite loss and gradient. in_a_row: steps without a number that
    the last step ended. spikes_in_a_row: the same for spikes. losses: of the last steps that were not skipped, in nats.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
        self.config = config
        fresh = {"skipped": 0, "spikes": 0, "in_a_row": 0, "spikes_in_a_row": 0, "losses": []}
        self.state: dict[str, Any] = {**fresh, **(state or {})}

    def limit(self) -> float:
        """The loss above which the next step is a spike; infinite until the window is full. The same on all ranks."""
        losses = self.state["losses"]
        if not self.config.spikes or len(losses) < self.config.spike_window:
            return math.inf
        return statistics.fmean(losses) + self.config.spike_sigma * statistics.pstdev(losses)

    def judge(self, loss: float, norm: float, skipped: bool) -> str | None:
        """Take note of a step; why it was skipped, or None. Spikes that go on for max_in_a_row steps are no spikes but
        a new level: the window begins anew then."""
        state = self.state
        if not skipped:
            state["in_a_row"] = state["spikes_in_a_row"] = 0
            if self.config.spikes:
                state["losses"] = [*state["losses"], loss][-self.config.spike_window :]
            return None
        state["skipped"] += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            state["in_a_row"] += 1
            return "loss" if not math.isfinite(loss) else "gradient"
        state["spikes"] += 1
        state["spikes_in_a_row"] += 1
        if state["spikes_in_a_row"] >= self.config.max_in_a_row:
            state["spikes_in_a_row"], state["losses"] = 0, []
        return "spike"

    @property
    def gives_up(self) -> bool:
        return self.state["in_a_row"] >= self.config.max_in_a_row
