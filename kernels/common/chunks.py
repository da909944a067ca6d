"""Query chunks under activation checkpointing: dense scores exist for one chunk at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def over_chunks(
    body: Callable[..., tuple[Tensor, ...]], length: int, chunk: int, *tensors: Tensor
) -> tuple[tuple[Tensor, ...], ...]:
    """The results of body(start, end, *tensors) for each chunk of [0, length), transposed: one tuple per output.

    The spans follow from the shapes alone. With several chunks and gradients on, a chunk keeps none of its
    intermediates and computes them again in the backward.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    spans = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    if len(spans) == 1 or not torch.is_grad_enabled():
        parts = [body(start, end, *tensors) for start, end in spans]
    else:
        parts = [
            checkpoint(body, start, end, *tensors, use_reentrant=False, preserve_rng_state=False)
            for start, end in spans
        ]
    return tuple(zip(*parts))
