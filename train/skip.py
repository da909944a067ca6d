"""Updates that are skipped where a loss or a gradient is no number, decided where the numbers are.

On a GPU the host does not wait for the decision: torch's fused AdamW takes a flag on the device (made for mixed
precision, arXiv 1710.03740, section 3.2) and leaves weights, moments and its step count as they are when it is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing when `should_skip()`, a bool scalar on the parameters' device, is true.

    grad_scale: fp32 scalar that gradients are divided by as the fused kernel reads them (its name in torch); None: 1.
    """

    should_skip: Callable[[], Tensor] | None = None
    grad_scale: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        if self.should_skip is None:
            return super().step(closure)
        skip = self.should_skip()
        if self.defaults["fused"]:
            self.found_inf = skip.float()
        elif skip:
            return None
        return super().step(closure)


def is_bad(loss: Tensor, norm: Tensor, limit: float) -> Tensor:
    """Whether a step with this loss and gradient norm, scalars, is to be skipped: bool scalar on their device."""
    return ~(torch.isfinite(loss) & torch.isfinite(norm) & (loss <= limit))
