"""From a step's plan to a rank's tensors, and where that is done: in this process, or in workers that read ahead."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sieve.data.packing import Batch, edges, longest
from sieve.data.rows import ReadError, Statistics, fill, row_hash
from sieve.data.stream import StepPlan, Stream

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Share:
    """A rank's rows of one step, and what is known of all rows.

    tokens, labels: int64 [rows, S] of this rank, its micro-batches one after the other; padding: bool [rows, S] or
    None; cu_seqlens: one int32 [N + 1] a micro-batch. plan_state: the state after the step, with an old hash; hashes:
    of all rows, in global order. labelled: tokens of the global step with a label.
    """

    tokens: Tensor
    labels: Tensor
    padding: Tensor | None
    cu_seqlens: list[np.ndarray]
    plan_state: dict[str, Any]
    hashes: list[bytes]
    phase: int
    epoch: int
    labelled: int
    statistics: Statistics

    def pin_memory(self) -> Share:
        """The same in page-locked memory, from which copies to a GPU do not wait. torch's loader calls it by name."""
        padding = None if self.padding is None else self.padding.pin_memory()
        return replace(
            self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory(), padding=padding,
            cu_seqlens=[torch.as_tensor(cu).pin_memory() for cu in self.cu_seqlens],
        )

    def micro_batches(self) -> list[Batch]:
        parts = len(self.cu_seqlens)
        padding = [None] * parts if self.padding is None else self.padding.chunk(parts)
        return [
            Batch(tokens, labels, torch.as_tensor(cu), longest(np.asarray(cu)), pad)
            for tokens, labels, cu, pad in zip(self.tokens.chunk(parts), self.labels.chunk(parts), self.cu_seqlens, padding)
        ]


@dataclass(frozen=True)
class Reader:
    """Reads the shares of `rank` of `world_size` ranks, of a stream, from a state on."""

    stream: Stream
    rank: int
    world_size: int

    def shares(self, state: dict[str, Any], first: int = 0, stride: int = 1) -> Iterator[Share]:
        """Endless: of the steps from `state` on, number first, first + stride, ...; the others are planned only."""
        for number in count():
            plan = self.stream.plan(state)
            if number % stride == first:
                yield self.read(plan)
            state = plan.state

    def read(self, plan: StepPlan) -> Share:
        phase = self.stream.phases[plan.phase]
        mine = phase.global_batch // self.world_size
        tokens, labels = np.empty((2, mine, phase.seq_len), np.int64)
        others = np.empty(phase.seq_len, np.int64)  # rows of other ranks are read for the hash alone
        starts, hashes, kept, labelled = [], [], [], 0
        for i, (bucket, row) in enumerate(plan.rows):
            if i // phase.micro_batch % self.world_size == self.rank:
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
        if phase.packing != "concatenate":
            padding = torch.from_numpy(np.arange(phase.seq_len) >= np.array([row.tokens for row in kept])[:, None])
        cu_seqlens = [edges(starts[i : i + phase.micro_batch], phase.seq_len) for i in range(0, mine, phase.micro_batch)]
        return Share(
            torch.from_numpy(tokens), torch.from_numpy(labels), padding, cu_seqlens, plan.state, hashes, plan.phase,
            plan.rows[-1][1].epoch, labelled, Statistics.of([row for _, row in plan.rows], phase.seq_len),
        )


def read_ahead(reader: Reader, state: dict[str, Any], *, workers: int, prefetch: int, pin: bool) -> Iterator[Share]:
    """The shares from `state` on: read when asked for (workers=0), or by processes that stay `prefetch` steps ahead
    each. Raises ReadError, also for a worker's. pin: in page-locked memory.

    Processes and not threads: a thread that copies documents, or waits for a page from the disk, holds the
    interpreter's lock, and the thread that launches kernels waits with it.
    """
    if not workers:
        for share in reader.shares(state):
            yield share.pin_memory() if pin else share
        return
    loader = DataLoader(
        _Steps(reader, state), batch_size=None, num_workers=workers, prefetch_factor=prefetch, pin_memory=pin,
        collate_fn=_as_it_is, worker_init_fn=partial(_begin_worker, os.getpid()), multiprocessing_context="fork",
        generator=torch.Generator(),  # else it draws a seed from training's own generator
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # children inherit it, until they ignore them
    try:
        items = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for item in items:
        if isinstance(item, str):
            raise ReadError(item)
        yield item


class _Steps(IterableDataset):
    """What a worker iterates: its part of the steps. Steps come back in order, since workers take turns."""

    def __init__(self, reader: Reader, state: dict[str, Any]):
        self._reader, self._state = reader, state

    def __iter__(self) -> Iterator[Share | str]:
        worker = get_worker_info()
        try:
            yield from self._reader.shares(self._state, worker.id, worker.num_workers)
        except ReadError as error:  # as text: torch would wrap it in a traceback of its own
            yield str(error)


def _as_it_is(share: Share) -> Share:
    return share


def _begin_worker(parent: int, worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the loop still needs its workers to finish a step
    and save. A parent killed outright takes them along, or they would hold the run's lock for seconds."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
