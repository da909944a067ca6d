"""A run that hangs says where, on every rank, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from pydantic import Field

from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    from sieve.train.saver import Done
    from sieve.train.state import RunState

STACKS = "stacks"
_GRACE = 3.0  # seconds from a rank's dump to its end, so that the others' are on the disk before anything is torn down
_LAST = 60.0  # seconds for a dump
_EXIT = 1


class WatchdogConfig(Config):
    seconds: float = Field(1800.0, ge=0, description="without a step for so long a run dumps its stacks and ends; 0: never")
    # A first step may compile kernels for minutes, a last save take a slow disk's time. Who asks for less time to go away
    # (SLURM's KillWait 30 s, Kubernetes' grace 30 s) ends what is left by SIGKILL, which loses no checkpoint either.
    stop_seconds: float = Field(600.0, ge=0, description="the same, from SIGTERM or SIGINT to the end; 0: no limit")


class Watchdog(Callback):
    """Dumps every thread's Python stack to `stacks/rank-NNNNN.txt` in the run's folder, and NCCL's flight recorder beside
    it on a GPU, when no step, evaluated batch or look at a slow save has come for `seconds`; then ends the process.

    Every rank watches itself: when one hangs, all stand still. A thread of Python does it, and behind it one of
    faulthandler's in C, for a main thread that hangs with the interpreter's lock in its hand.
    """

    def __init__(self, config: WatchdogConfig) -> None:
        self.config = config
        self._beat = self._armed = 0.0
        self._over = threading.Event()
        self._file: IO[str] | None = None

    def start(self, run: RunState) -> None:
        if not self.config.seconds:
            return
        self._file = _open(run.directory, run.rank)
        self._alive(run)
        self._over.clear()
        pause = min(1.0, self.config.seconds / 4)
        threading.Thread(target=self._watch, args=(pause, run.rank), name="watchdog", daemon=True).start()

    def step(self, run: RunState, record: dict | None) -> None:
        self._alive(run)

    def evaluated(self, run: RunState, record: dict) -> None:
        self._alive(run)

    def waiting(self, run: RunState) -> None:
        self._alive(run)

    def saved(self, run: RunState, done: Done) -> None:
        self._alive(run)

    def end(self, run: RunState, status: str) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            empty = os.fstat(self._file.fileno()).st_size == 0
            self._file.close()
            if empty:
                Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _alive(self, run: RunState) -> None:
        self._beat = now = time.monotonic()
        if self._file is not None and now - self._armed > 1.0:
            self._armed = now
            seconds = self.config.seconds + 4 * _GRACE  # after the other, if that can run
            faulthandler.dump_traceback_later(seconds, file=self._file, exit=True)

    def _watch(self, pause: float, rank: int) -> None:
        while not self._over.wait(pause):
            if time.monotonic() - self._beat > self.config.seconds and (file := self._file) is not None:
                _bark(file, rank, f"no step for {self.config.seconds:g} s (watchdog.seconds)")


def end_late(directory: Path, rank: int, seconds: float) -> NoReturn:
    """Dump and end a process that has not come to its end `seconds` after a signal."""
    why = f"not ended {seconds:g} s after a signal (watchdog.stop_seconds), the last checkpoint stands"
    try:
        file = _open(directory, rank)
    except OSError:  # no place for it: better on the terminal than nowhere
        file = sys.stderr
    _bark(file, rank, why)


def _open(directory: Path, rank: int) -> IO[str]:
    path = directory / STACKS / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w")


def _bark(file: IO[str], rank: int, why: str) -> NoReturn:
    faulthandler.dump_traceback_later(_LAST, file=file, exit=True)  # should what follows hang, too
    print(f"{why}: rank {rank}'s stacks:\n", file=file, flush=True)
    faulthandler.dump_traceback(file, all_threads=True)
    if file is not sys.stderr:
        os.fsync(file.fileno())
        _dump_nccl(Path(file.name).with_suffix(".nccl"))
    print(f"sieve train: rank {rank}: {why}; its stacks are in {file.name}; ending", file=sys.stderr, flush=True)
    time.sleep(_GRACE)
    os._exit(_EXIT)


def record_nccl(directory: Path) -> None:
    """Let NCCL's flight recorder run (pytorch.org, "Flight Recorder for Debugging Stuck Jobs"): the last collectives of
    each rank, written to `directory`/stacks/nccl-N when one of them times out. Before the process group is opened."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(directory.resolve() / STACKS / "nccl-"))


def _dump_nccl(path: Path) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    if torch.distributed.is_nccl_available() and torch.distributed.is_initialized():
        path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
