"""Query chunks under activation checkpointing: dense scores exist for one chunk at a time, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # queries whose dense scores are held at once on a CPU, where that many stay in its cache
CUDA_SCORES = 1 << 28  # scores held at once on a GPU, which many small chunks would leave waiting for launches


def chunk_of(queries: Tensor) -> int:
    """Queries of [..., n, x] at a time, if each is scored with n keys for every leading index."""
    if not queries.is_cuda:
        return CHUNK
    each = max(math.prod(queries.shape[:-1]), 1)
    return max(1 << (CUDA_SCORES // each).bit_length() >> 1, CHUNK)


def over_chunks(
    body: Callable[..., tuple[Tensor, ...]], chunk: int | None, queries: tuple[Tensor, ...], *keys: Tensor
) -> tuple[tuple[Tensor, ...], ...]:
    """The results of body(start, end, *queries, *keys) for each chunk of queries, transposed: one tuple per output.

    queries [..., n, x] are cut along their last dimension but one to [start, end); keys come whole. The spans follow
    from the shapes alone. With several chunks and gradients on, a chunk keeps none of its intermediates and computes
    them again in the backward. chunk: queries at a time; None: chunk_of(queries[0]).
    """
    chunk = chunk_of(queries[0]) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    # One split, not a slice for each chunk: the backward of a slice fills a tensor of the whole length.
    cut = zip(*(x.split(chunk, -2) for x in queries))
    spans = [(start, min(start + chunk, queries[0].shape[-2])) for start in range(0, queries[0].shape[-2], chunk)]
    if len(spans) == 1 or not torch.is_grad_enabled():
        parts = [body(*span, *qs, *keys) for span, qs in zip(spans, cut)]
    else:
        parts = [
            checkpoint(body, *span, *qs, *keys, use_reentrant=False, preserve_rng_state=False)
            for span, qs in zip(spans, cut)
        ]
    return tuple(zip(*parts))
