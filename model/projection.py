"""Several linear layers of one input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sieve.kernels.common.availability import why_not_triton

MOST_TOKENS = 64  # beyond, a product takes longer than its launch


def project(x: Tensor, *layers: nn.Linear, step: bool = False) -> tuple[Tensor, ...]:
    """x [.., in] -> what each of `layers` (without biases) makes of it, [.., out].

    Compiled it is one product over all their weights laid side by side: narrow ones, such as a few KV heads', fill a GPU
    badly by themselves, and x's gradient is one product too instead of a sum of several. Results are then views of it.
    step: x [T, in] are the tokens of a step of decoding, see `one_launch`.
    """
    if step and one_launch(x):
        from sieve.kernels.common import project_triton  # needs the package triton

        return project_triton.project(x, [layer.weight for layer in layers])
    if not torch.compiler.is_compiling():
        return tuple(layer(x) for layer in layers)
    return F.linear(x, torch.cat([layer.weight for layer in layers])).split([layer.out_features for layer in layers], -1)


def one_launch(x: Tensor) -> bool:
    """Whether several products with the x [T, in] of a step are to be one launch: of few tokens, on a GPU, without gradients.

    Not where a whole text might be as short: its results are to be the same to the bit whether gradients are wanted or not.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.is_cuda or x.shape[0] > MOST_TOKENS:
        return False
    return why_not_triton(x.device, x.dtype) is None
