"""From a step's plan to a rank's tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sieve.data.buckets import Bucket
from sieve.data.packers import RowPlan
from sieve.data.packing import Batch, edges
from sieve.data.rows import Statistics, fill, row_hash
from sieve.data.stream import StepPlan, Stream


@dataclass(frozen=True)
class Share:
    """A rank's rows of one step, and what is known of all rows.

    tokens, labels: int64 [rows, S] of this rank, its micro-batches one after the other; padding: bool [rows, S] or
    None; edges: cu_seqlens, int32 [N + 1], and max_seqlen of each micro-batch. plan_state: the state after the step,
    with an old hash; rows: what the step was read from; hashes: of all rows, in global order. labelled: tokens of the
    global step with a label.
    """

    tokens: Tensor
    labels: Tensor
    padding: Tensor | None
    edges: list[tuple[np.ndarray | Tensor, int]]
    plan_state: dict[str, Any]
    rows: list[tuple[Bucket, RowPlan]]
    hashes: list[bytes]
    phase: int
    epoch: int
    labelled: int
    statistics: Statistics

    def pin_memory(self) -> Share:
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        padding = None if self.padding is None else self.padding.pin_memory()
        return replace(
            self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory(), padding=padding,
            edges=[(torch.as_tensor(cu).pin_memory(), longest) for cu, longest in self.edges],
        )

    def micro_batches(self) -> list[Batch]:
        parts = len(self.edges)
        padding = [None] * parts if self.padding is None else self.padding.chunk(parts)
        return [
            Batch(tokens, labels, torch.from_numpy(cu) if isinstance(cu, np.ndarray) else cu, longest, pad)
            for tokens, labels, (cu, longest), pad in zip(
                self.tokens.chunk(parts), self.labels.chunk(parts), self.edges, padding
            )
        ]


def read_share(stream: Stream, plan: StepPlan, rank: int, world_size: int) -> Share:
    """The share of `rank` of `world_size` ranks in a step of `stream`. Raises ReadError. Any number of threads may read
    at once: nothing of the stream changes."""
    phase = stream.phases[plan.phase]
    mine = phase.global_batch // world_size
    tokens, labels = np.empty((2, mine, phase.seq_len), np.int64)
    others = np.empty(phase.seq_len, np.int64)  # rows of other ranks are read for the hash alone
    starts, hashes, kept, labelled = [], [], [], 0
    for i, (bucket, row) in enumerate(plan.rows):
        if i // phase.micro_batch % world_size == rank:
            at = len(kept)
            begins, count_of = fill(bucket, row, tokens[at], labels[at])
            starts.append(begins)
            kept.append(row)
            hashes.append(row_hash(tokens[at]))
        else:
            _, count_of = fill(bucket, row, others, None)
            hashes.append(row_hash(others))
        labelled += count_of
    padding = None
    if any(row.tokens < phase.seq_len for row in kept):
        padding = torch.from_numpy(np.arange(phase.seq_len) >= np.array([row.tokens for row in kept])[:, None])
    cut = [edges(starts[i : i + phase.micro_batch], phase.seq_len) for i in range(0, mine, phase.micro_batch)]
    return Share(
        torch.from_numpy(tokens), torch.from_numpy(labels), padding, cut, plan.state, plan.rows, hashes, plan.phase,
        plan.rows[-1][1].epoch, labelled, Statistics.of([row for _, row in plan.rows], phase.seq_len),
    )
