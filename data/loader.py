"""Global steps of rows for one rank, each with the state to go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sieve.data.buckets import Bucket
from sieve.data.packers import RowPlan
from sieve.data.packing import Batch
from sieve.data.phases import Phase
from sieve.data.read_ahead import ReadAhead
from sieve.data.rows import roll
from sieve.data.stream import Stream
from sieve.data.tokens import Tokens


@dataclass(frozen=True)
class Step:
    """One global step as one rank sees it.

    micro_batches: this rank's, in order. state: JSON-able, where the next step begins. phase: its index. epoch: of the
    step's last token, from 0. tokens: of the whole global step, every rank's, with padding. labelled: how many of those
    have a label, what a mean over the global batch divides by. metrics: `data/...` of the step. rows: all of them, as they
    were planned, each with its bucket.
    """

    micro_batches: list[Batch]
    state: dict[str, Any]
    phase: int
    epoch: int
    tokens: int
    labelled: int
    metrics: dict[str, float]
    rows: list[tuple[Bucket, RowPlan]]

    @property
    def documents(self) -> list[str]:
        """What the global step holds tokens of: SOURCE/NUMBER, the document's number in the source's store."""
        return sorted({f"{bucket.source}/{piece[0]}" for bucket, row in self.rows for piece in row.pieces})


class RowLoader:
    """Endless iterator of Steps over a stream; its `state` travels with every Step and resumes bit for bit.

    Rows are numbered over the whole run; a global step takes the next `global_batch` of them, and micro-batch m of
    rank r is rows (m * world_size + r) * micro_batch and following of those. Every rank reads all rows, from memory
    maps, so that state and hash need no communication and depend on neither ranks, micro_batch nor workers.
    """

    def __init__(
        self,
        sources: Mapping[str, Tokens],
        phases: Sequence[Phase],
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin: torch.device | None = None,
        state: dict[str, Any] | None = None,
    ):
        """workers: threads that read ahead, `prefetch` steps each; 0: none. pin: a CUDA device, to give memory that is
        page-locked for it. Raises ValueError when sizes do not divide, as Stream does, and when `state` belongs to
        another stream."""
        for phase in phases:
            check_batch(phase.global_batch, phase.micro_batch, rank, world_size)
        stream = Stream(sources, phases, seed)
        self._state = stream.start() if state is None else stream.checked(state)
        self._several = len(sources) > 1
        self._source_of = {bucket.name: bucket.source for bucket in stream.buckets}
        self._shares = ReadAhead(
            stream, self._state, rank=rank, world_size=world_size, workers=workers, prefetch=prefetch, pin=pin
        )

    @property
    def state(self) -> dict[str, Any]:
        """Where the next Step begins."""
        return self._state

    def __iter__(self) -> RowLoader:
        return self

    def __next__(self) -> Step:
        share = next(self._shares)
        self._state = {**share.plan_state, "hash": roll(self._state["hash"], share.hashes)}
        metrics = share.statistics.metrics() | self._by_source()
        return Step(
            share.micro_batches(), self._state, share.phase, share.epoch, share.statistics.positions, share.labelled,
            metrics, share.rows,
        )

    def close(self) -> None:
        """End the workers, if there are any; no step follows."""
        self._shares.close()

    def _by_source(self) -> dict[str, float]:
        """Tokens read of each source of a mixture, and how often that is all of it."""
        if not self._several:
            return {}
        tokens: dict[str, int] = {}
        epochs: dict[str, int] = {}
        for name, entry in self._state["buckets"].items():
            source = self._source_of[name]
            tokens[source] = tokens.get(source, 0) + entry["tokens"]
            epochs[source] = max(epochs.get(source, 0), entry["cursor"][0])
        return {f"data/{s}/tokens": n for s, n in tokens.items()} | {f"data/{s}/epoch": n for s, n in epochs.items()}


def check_batch(global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
    """Raises ValueError unless the rows of a step can be spread over the ranks in whole micro-batches."""
    if min(global_batch, micro_batch, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"global_batch={global_batch}, micro_batch={micro_batch}, world_size={world_size}, rank={rank}; the first "
            "three must be at least 1 and 0 <= rank < world_size"
        )
    group = micro_batch * world_size
    if global_batch % group:
        near = sorted({max(global_batch // group, 1) * group, (global_batch // group + 1) * group})
        fix = f"choose global_batch={' or '.join(map(str, near))}"
        if global_batch % world_size == 0:
            share = global_batch // world_size
            fix += f", or micro_batch={' or '.join(str(d) for d in range(1, share + 1) if share % d == 0)}"
        raise ValueError(
            f"global_batch={global_batch} is not divisible by micro_batch * world_size = {micro_batch} * {world_size} "
            f"= {group}; {fix}"
        )
