"""One case of `sieve bench training`: real optimizer steps of one model on synthetic rows, timed, in this process."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sieve.data.loader import Step
from sieve.data.packing import Batch, edges
from sieve.kernels.common.ranges import named
from sieve.model.count import count_parameters, dense_flops_per_token, flops_per_token
from sieve.model.init import initial_value
from sieve.train.build import build_model
from sieve.train.callbacks.profile import Recorder
from sieve.train.config import RunConfig
from sieve.train.distributed import Place, process_group
from sieve.train.engine import Engine
from sieve.train.guard import Guard
from sieve.train.loop import train_step
from sieve.train.metrics import device_peak_flops, mfu, peak_memory_bytes
from sieve.train.optim import adamw
from sieve.train.outcome import Ledger, Outcome
from sieve.train.overrides import load_config
from sieve.train.phases import ropes
from sieve.train.state import RunState
from sieve.train.zero import deepspeed_config


def rows(config: RunConfig, vocab: int, documents: int, pin: bool, learnable: bool = False) -> Iterator[Step]:
    """Endless steps of random tokens, always the same ones. documents: a row's, cut at random places, anew each step.

    learnable: tokens that follow from the one before (with noise), so that a loss has something to fall to.
    """
    random, S, tokens = np.random.default_rng(config.seed), config.seq_len, 0
    follower = random.permutation(vocab)
    micro, count = config.micro_batch, config.global_batch // config.micro_batch
    while True:
        batches = []
        for _ in range(count):
            text = random.integers(0, vocab, (micro, S + 1))
            if learnable:
                for i in np.flatnonzero(random.random(S) < 0.8):
                    text[:, i + 1] = follower[text[:, i]]
            starts = [[0, *sorted(random.choice(np.arange(1, S), documents - 1, replace=False))] for _ in range(micro)]
            cu_seqlens, longest = edges(starts, S)
            parts = [torch.from_numpy(np.ascontiguousarray(x)) for x in (text[:, :-1], text[:, 1:], cu_seqlens)]
            batches.append(Batch(*(x.pin_memory() if pin else x for x in parts), int(longest)))
        step = config.global_batch * S
        tokens += step
        state = {"tokens": tokens, "hash": "synthetic", "phase": 0}
        yield Step(batches, state, 0, 0, step, step, {}, [])


class Case:
    """A model under the trainer's own engine, ready to step; to be closed."""

    def __init__(self, overrides: list[str], vocab: int, documents: int, learnable: bool = False) -> None:
        self.config = load_config([*overrides, "logger=none", "eval.every=0", "schedule.warmup=0"])
        self.place, self._stack = Place.of(self.config.device), ExitStack()
        self._stack.enter_context(process_group(self.place))
        config, place = self.config, self.place
        module = build_model(config, place.device, vocab)
        zero = deepspeed_config(
            config.zero, dtype=config.dtype, clip=config.optim.clip, global_batch=config.global_batch,
            micro_batch=config.micro_batch, world_size=1, cuda=place.device.type == "cuda",
        )
        self.engine = Engine(
            module, adamw(module, config.optim, place.device), zero, place, clip=config.optim.clip,
            initial=partial(initial_value, config=config.model, seed=config.seed),
            ropes=ropes(config.model.rope, config.phases),
        )
        need = config.model, config.attention, vocab, config.seq_len // documents
        self.flops = flops_per_token(*need)
        self.dense_flops = sum(dense_flops_per_token(*need).values())
        self.parameters = count_parameters(config.model, config.attention, vocab)
        self.run = RunState(config, config.directory, 0, 1, config.total_steps, self.flops)
        self.ledger = Ledger(Guard(config.guard), lag=place.device.type == "cuda")
        self.steps = rows(config, vocab, documents, place.device.type == "cuda", learnable)

    def launch(self, logged: bool = False) -> Outcome:
        """One step, as far as the host is concerned."""
        with named("step"):
            with named("data"):
                step = next(self.steps)
            return train_step(self.run, self.engine, step, self.place, self.ledger.guard, logged)

    def step(self, logged: bool = False) -> dict | None:
        """One step; its record if `logged`."""
        outcome = self.launch(logged)
        self.ledger.add(self.run, outcome, now=logged)
        return outcome.record

    def wait(self) -> None:
        if self.place.device.type == "cuda":
            torch.cuda.synchronize(self.place.device)

    def close(self) -> None:
        self.engine.close()
        self._stack.close()


def measure(case: Case, warmup: int, steps: int, seconds: float, profile: Path | None) -> dict[str, Any]:
    """Times `steps` steps, fewer when `seconds` are over, after `warmup`; with a folder also a breakdown of two more."""
    began = time.perf_counter()
    for _ in range(warmup):
        case.step()
    case.wait()
    warm = time.perf_counter() - began
    if case.place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.place.device)
    # Each step's end is marked where it is computed: a wait would keep the host from running ahead.
    marks, clock = [_Mark(case.place.device)], time.perf_counter()
    while len(marks) <= steps and (len(marks) < 4 or time.perf_counter() - clock < seconds):
        case.step()
        marks.append(_Mark(case.place.device))
    case.wait()
    times = [a.until(b) for a, b in zip(marks, marks[1:])]
    median = statistics.median(times)
    rate = case.config.global_batch * case.config.seq_len / median
    peak = device_peak_flops(case.place.device)
    flops = sum(case.flops.values())
    found: dict[str, Any] = {
        "step_seconds": median, "low": min(times), "high": max(times), "steps": len(times), "warmup_seconds": warm,
        "tokens_per_second": rate, "mfu": None if peak is None else mfu(flops, rate, peak, 1),
        "mfu_dense_equivalent": None if peak is None else mfu(case.dense_flops, rate, peak, 1),
        "peak_bytes": peak_memory_bytes(case.place.device), "flops_per_token": case.flops,
        "parameters": case.parameters.total, "active": case.parameters.active,
    }
    if case.place.device.type == "cuda":
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(case.place.device)
    if profile is not None:
        recorder = Recorder(case.place.device)
        recorder.start()
        for _ in range(2):
            case.step()
        found["breakdown"] = recorder.stop(profile).json()
    found["loss"] = case.step(logged=True)["train/loss"]
    return found


class _Mark:
    """A moment of the device's own time; of the host's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._host = time.perf_counter()

    def until(self, other: _Mark) -> float:
        if self._event is None:
            return other._host - self._host
        return self._event.elapsed_time(other._event) / 1e3


def losses(overrides: list[str], vocab: int, documents: int, steps: int) -> list[float]:
    """The loss of each of `steps` steps."""
    case = Case(overrides, vocab, documents, learnable=True)
    try:
        return [case.step(logged=True)["train/loss"] for _ in range(steps)]
    finally:
        case.close()


def main(argv: list[str] | None = None) -> int:
    """Reads the job, as JSON, from the first argument, and writes what came out of it to the file named there."""
    job = json.loads((sys.argv[1:] if argv is None else argv)[0])
    out = Path(job["out"])
    try:
        if job["what"] == "losses":
            found: dict[str, Any] = {"losses": losses(job["overrides"], job["vocab"], job["documents"], job["steps"])}
        else:
            case = Case(job["overrides"], job["vocab"], job["documents"])
            try:
                profile = None if job["profile"] is None else Path(job["profile"])
                found = measure(case, job["warmup"], job["steps"], job["seconds"], profile)
            finally:
                case.close()
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
    except Exception as error:  # a case that fails is a line of the table, and the next one runs
        import traceback

        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
