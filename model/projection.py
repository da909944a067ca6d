"""Several linear layers of one input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """x [.., in] -> what each of `layers` (without biases) makes of it, [.., out].

    Compiled it is one product over all their weights laid side by side: narrow ones, such as a few KV heads', fill a GPU
    badly by themselves, and x's gradient is one product too instead of a sum of several. Results are then views of it.
    """
    if not torch.compiler.is_compiling():
        return tuple(layer(x) for layer in layers)
    return F.linear(x, torch.cat([layer.weight for layer in layers])).split([layer.out_features for layer in layers], -1)
