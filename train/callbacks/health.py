"""What happens inside the model: NSA's gates and choices, and how evenly the experts are used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sieve.train.callbacks.callback import Callback
from sieve.train.metrics import moe_metrics

if TYPE_CHECKING:
    from sieve.train.state import RunState


class Health(Callback):
    """Writes `nsa/layer_NN/*` and `moe/layer_NN/*` of the step into its record, from what the loop left in `run`."""

    def step(self, run: RunState, record: dict | None) -> None:
        if record is None:
            return
        health = {name: float(value) for name, value in run.health.items()}
        record.update({name: value for name, value in health.items() if not math.isnan(value)})  # NaN: dense layers
        record.update(moe_metrics(run.expert_load, run.step_load, run.router_bias))
