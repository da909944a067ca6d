"""The learning rate as a function of the step: warm-up, then warmup-stable-decay or a cosine."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from sieve.model.config import Config


class ScheduleConfig(Config):
    """`wsd`: constant, then down to the floor over the run's last part (arXiv 2405.18392); `cosine`: down all the way.

    `warmup` and `decay` below 1 are shares of the run, from 1 on they are steps.
    """

    type: Literal["wsd", "cosine"] = "wsd"
    warmup: float = Field(0.02, ge=0, description="linear rise from 0: a share of the run below 1, else steps")
    decay: float = Field(0.2, ge=0, description="wsd's fall at the end: a share of the run below 1, else steps")
    decay_shape: Literal["linear", "sqrt"] = Field("linear", description="of wsd's fall; sqrt is 1 - sqrt(x)")
    min_ratio: float = Field(0.1, ge=0, le=1, description="the last step's learning rate over optim.lr")


def ratio(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The learning rate of `step` (1 .. total_steps) over the peak's, in [0, 1]; the last step has min_ratio.

    Pure, so that a resumed run needs no state of it. Where warm-up and decay overlap, the decay gives way.
    """
    warmup = min(steps_of(config.warmup, total_steps), total_steps)
    if step <= warmup:
        return step / warmup
    falling = total_steps - warmup
    if config.type == "wsd":
        falling = min(steps_of(config.decay, total_steps), falling)
    progress = 1 - (total_steps - step) / falling if falling else 0.0  # 1 at the last step
    if progress <= 0:
        return 1.0
    progress = min(progress, 1.0)
    if config.type == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    else:
        left = 1 - (math.sqrt(progress) if config.decay_shape == "sqrt" else progress)
    return config.min_ratio + (1 - config.min_ratio) * left


def steps_of(value: float, total_steps: int) -> int:
    """A length given as a share of the run (below 1) or in steps, in steps."""
    return math.ceil(value * total_steps) if value < 1 else round(value)
