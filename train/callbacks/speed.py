"""Throughput, step time, utilisation and memory of each logged step, with evaluation and checkpoints left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from sieve.train.callbacks.callback import Callback
from sieve.train.metrics import device_peak_flops, mfu, peak_memory_bytes

if TYPE_CHECKING:
    from sieve.train.saver import Done
    from sieve.train.state import RunState


class Speed(Callback):
    """Writes `perf/*` into each record.

    `perf/step_seconds` is the mean over the steps since the last record, `perf/tokens_per_second` the tokens of those
    steps over the same seconds, all ranks together. The clock stands still from the end of a step to the end of the
    evaluation or the checkpoint after it. Compilation is inside the first records: whoever wants a steady number takes
    the median and leaves the first ones out, as `sieve compare` does.

    flops_per_token, dense_flops_per_token: training FLOPs of the model, and of the same model with full attention, in
    each phase of the run.
    """

    def __init__(
        self, device: torch.device, flops_per_token: Sequence[float], dense_flops_per_token: Sequence[float],
        *, clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self.flops = {"perf/mfu": flops_per_token, "perf/mfu_dense_equivalent": dense_flops_per_token}
        self.peak = device_peak_flops(device)
        self.clock = clock
        self.mark = self.seconds = 0.0
        self.steps = self.tokens = 0

    def start(self, run: RunState) -> None:
        self.mark, self.seconds, self.steps, self.tokens = self.clock(), 0.0, 0, run.tokens

    def step(self, run: RunState, record: dict | None) -> None:
        now = self.clock()
        self.seconds += now - self.mark
        self.mark = now
        self.steps += 1
        if record is None:
            return
        rate = (run.tokens - self.tokens) / self.seconds
        record["perf/tokens_per_second"] = rate
        record["perf/step_seconds"] = self.seconds / self.steps
        if self.peak is not None:
            for name, flops in self.flops.items():
                record[name] = mfu(flops[run.phase], rate, self.peak, run.world_size)
        record["perf/peak_memory_bytes"] = peak_memory_bytes(self.device)
        self.seconds, self.steps, self.tokens = 0.0, 0, run.tokens

    def evaluated(self, run: RunState, record: dict) -> None:
        self.mark = self.clock()

    def saving(self, run: RunState) -> None:
        self.mark = self.clock()

    def saved(self, run: RunState, done: Done) -> None:
        self.mark = self.clock()
