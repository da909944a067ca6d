"""Writing checkpoints beside the training: a copy in host memory, files from a thread, one rename at the end.

    step N: every rank has its state copied to host memory and starts its thread; on a GPU training goes on at once and
            only the next update waits for the copy (sieve.train.hostcopy), else it stands still for the copying alone
    later:  each thread writes and syncs its files in `.tmp-step-N`; at every step the ranks ask each other who is done
    all:    rank 0's thread writes the manifest, then COMPLETE, syncs, renames, and only then deletes what is too old

Whatever goes wrong on the way, on any rank, the ranks agree on it, the attempt is removed and told of, and training goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sieve.data.tokenizer_export import described
from sieve.train.checkpoint import COMPLETE, FOLDER, FORMAT, MANIFEST, TEMPORARY, checkpoints, discard, name_of
from sieve.train.distributed import Place, gather, sum_over_ranks
from sieve.train.engine import Engine
from sieve.train.hostcopy import Copier, HostCopy, copier_for
from sieve.train.partition import Piece, persistent_buffers, shapes
from sieve.train.shards import share
from sieve.train.state import RunState, random_state
from sieve.train.tensorfile import sync_folder, write_bytes
from sieve.train.text import byte_size

if TYPE_CHECKING:
    from sieve.data.tokenizer import Encoder
    from sieve.train.callbacks.checkpoint import CheckpointConfig

log = logging.getLogger(__name__)

_POLL = 0.01  # seconds between two looks at a save that is being waited for
_NOTICE = 60.0  # seconds of waiting after which it is told, again and again


@dataclass(frozen=True)
class Done:
    """A save's outcome: the checkpoint's folder, or why there is none. stall, seconds: training stood still; in all."""

    step: int
    path: Path | None
    problem: str | None
    size: int
    stall: float
    seconds: float


class Saver:
    """Saves one state at a time. All ranks call every method together.

    pending: whether a save has begun and its outcome is not known yet.
    """

    def __init__(
        self, config: CheckpointConfig, engine: Engine, place: Place, copier: Copier | None = None, *,
        tokenizer: Encoder | None = None,
    ) -> None:
        """tokenizer: the run's, of which every checkpoint gets a copy, so that it is of use without the text it is from.
        copier: another than the device's own, for tests."""
        self.config, self.engine, self.place, self._tokenizer = config, engine, place, tokenizer
        self.copy = HostCopy(copier or copier_for(place.device))
        engine.before_update = self.copy.fence
        self.pending = False
        self._thread = ThreadPoolExecutor(1, "checkpoint", self._enter)
        self._job: Future | None = None
        self._prepared: Future | None = None
        self._committing = False

    def prepare(self) -> None:
        """Have the thread get the host memory that copies will take, before the first save."""
        self._prepared = self._thread.submit(self.copy.reserve, *self._state())

    def _enter(self) -> None:
        """In the thread, first: a thread's device is the first one until it says otherwise."""
        if self.place.device.type == "cuda":
            torch.cuda.set_device(self.place.device)

    def _state(self) -> tuple[list[Piece], dict[str, Tensor]]:
        """What this rank has to write."""
        pieces = self.engine.pieces()
        if self.engine.replicated:
            pieces = share(pieces, self.place.rank, self.place.world_size)
        return pieces, persistent_buffers(self.engine.module) if self.place.rank == 0 else {}

    def begin(self, run: RunState) -> None:
        """Copy the state of `run` as it is now and start writing it. Not while another save is pending."""
        self._began = time.monotonic()
        self._step, self._folder = run.step, run.directory / FOLDER
        self._final = self._folder / name_of(run.step)
        self._partial = self._folder / f"{TEMPORARY}{self._final.name}"
        if self._prepared is not None:
            self._prepared.result()
            self._prepared = None
        pieces, buffers = self._state()
        self.copy.take(pieces, buffers)
        generators = io.BytesIO()
        load = {layer: tokens.cpu() for layer, tokens in run.load_since.items()}
        torch.save(random_state() | {"load_since": load}, generators)
        buffers = persistent_buffers(self.engine.module)
        manifest = {
            "format": FORMAT, "step": run.step, "tokens": run.tokens, "tokens_before": run.tokens_before,
            "tokens_hash": (run.data or {}).get("hash"), "evaluated_step": run.evaluated_step, "world_size": run.world_size,
            "zero_stage": run.config.zero.stage, "wandb_id": run.wandb_id, "guard": run.guard, "data": run.data,
            "validation": run.validation,
            "parameters": {**shapes(self.engine.module), **{n: list(b.shape) for n, b in buffers.items()}},
            "buffers": sorted(buffers), "config": run.config.dump(),
            "tokenizer": None if self._tokenizer is None else described(self._tokenizer),
        }
        self._manifest = (json.dumps(manifest, indent=1) + "\n").encode()
        self.pending, self._committing, self._stall = True, False, time.monotonic() - self._began
        self._job = self._thread.submit(self._write, generators.getvalue())

    def poll(self) -> Done | None:
        """Look after the pending save; its outcome once there is one. Cheap: one small sum over the ranks."""
        failed = self._job is not None and self._job.done() and self._job.exception() is not None
        finished = self._job is None or self._job.done()
        count, failures = sum_over_ranks(torch.tensor([float(finished), float(failed)])).tolist()
        if count < self.place.world_size:
            return None
        if failures:
            return self._give_up()
        if self._committing:
            return self._outcome(self._final, None)
        files = [entry for rank in gather(self._job.result()) for entry in rank]
        self._committing = True
        self._job = self._thread.submit(self._commit, files) if self.place.rank == 0 else None
        return None

    def wait(self, patience: float | None = None, alive: Callable[[], None] = lambda: None) -> Done | None:
        """The outcome of the pending save; None when it is not there after `patience` seconds (None: wait for ever).
        alive: called again and again meanwhile."""
        begin = told = time.monotonic()
        while (done := self.poll()) is None:
            alive()
            now = time.monotonic()
            # One rank's clock decides for all, or some would go on while others wait.
            late = self.place.rank == 0 and patience is not None and now - begin > patience
            if patience is not None and sum_over_ranks(torch.tensor(float(late))).item():
                return None
            if now - told > _NOTICE:
                told = now
                log.warning("the checkpoint of step %d is still being written after %.0f s", self._step, now - self._began)
            time.sleep(_POLL)
        return done

    def _write(self, generators: bytes) -> list[tuple[str, str]]:
        """In the thread: this rank's files; their names and sha256."""
        self._partial.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.place.rank:05d}"
        _, tensors = self.copy.write(self._partial / f"{name}.safetensors")
        _, state = write_bytes(self._partial / f"{name}.pt", generators)
        return [(f"{name}.safetensors", tensors), (f"{name}.pt", state)]

    def _commit(self, files: list[tuple[str, str]]) -> None:
        """In rank 0's thread: after this the checkpoint exists, whole; before, nothing of it does."""
        if self._tokenizer is not None:
            _, digest = write_bytes(self._partial / self._tokenizer.FILE, self._tokenizer.model)
            files = [*files, (self._tokenizer.FILE, digest)]
        _, digest = write_bytes(self._partial / MANIFEST, self._manifest)
        listed = "".join(f"{sha256}  {name}\n" for name, sha256 in [*files, (MANIFEST, digest)])
        write_bytes(self._partial / COMPLETE, listed.encode())
        wanted = {name for name, _ in files} | {MANIFEST, COMPLETE}
        for path in self._partial.iterdir():  # of an attempt that was cut off
            if path.name not in wanted:
                path.unlink()
        sync_folder(self._partial)
        discard(self._final)  # of a run that was set back to before this step; else there is none
        self._partial.rename(self._final)
        sync_folder(self._folder)
        every = self.config.keep_every
        for step, path in list(checkpoints(self._folder.parent).items())[: -self.config.keep]:
            if every and step % every == 0:
                continue
            try:
                discard(path)
            except OSError as error:  # the new one is safe all the same
                log.warning("%s is no longer needed and cannot be removed: %s", path, error.strerror)

    def _give_up(self) -> Done:
        """Some rank could not write: tidy up and say why. Known here: only OSErrors are survived, anything else is a
        bug and is raised."""
        error = None if self._job is None else self._job.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        reason = None if error is None else f"{error.strerror or error} (rank {self.place.rank})"
        problem = next(reason for reason in gather(reason) if reason)
        if self.place.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                problem += f"; {byte_size(shutil.disk_usage(self._folder).free)} are free in {self._folder}"
        return self._outcome(None, problem)

    def _outcome(self, path: Path | None, problem: str | None) -> Done:
        self.pending = False
        seconds = time.monotonic() - self._began
        return Done(self._step, path, problem, self.copy.size, self._stall, seconds)

    def close(self) -> None:
        """End the thread, once it is through with what it does."""
        self._thread.shutdown()

