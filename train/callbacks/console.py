"""What the terminal shows while training: a progress bar with the time left, or plain lines when nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sieve.train.callbacks.callback import Callback
from sieve.train.text import byte_size, duration, short_count

if TYPE_CHECKING:
    from sieve.train.saver import Done
    from sieve.train.state import RunState


def summary(record: dict) -> str:
    """The numbers of a record that a person wants beside the progress: loss, gap to the baseline, speed."""
    parts = []
    if "train/loss" in record:
        parts.append(f"loss {record['train/loss']:.4f}")
    if "baseline/loss_gap" in record:
        marked = "?" if record.get("baseline/mismatch") else ""  # other tokens than the baseline's
        parts.append(f"gap {record['baseline/loss_gap']:+.4f}{marked}")
    if "perf/tokens_per_second" in record:
        parts.append(f"{short_count(record['perf/tokens_per_second'])} tok/s")
    return "  ".join(parts)


class Console(Callback):
    """Progress on rank 0: a bar on a terminal, else a line a record. The ETA counts evaluations and checkpoints."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.terminal = Terminal(file=stream, highlight=False, soft_wrap=True)
        self.clock = clock
        self.bar: Progress | None = None
        self.began = 0.0
        self.first_step = 0

    def start(self, run: RunState) -> None:
        if run.rank != 0:
            return
        self.began, self.first_step = self.clock(), run.step
        resumed = f", resumed at step {run.resumed_from}" if run.resumed_from is not None else ""
        self._say(f"{run.directory}: {run.total_steps} steps{resumed}")
        if self.terminal.is_terminal and not self.terminal.is_dumb_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("ETA {task.fields[eta]}"),
                console=self.terminal, expand=True,
            )
            self.bar.add_task(run.directory.name, total=run.total_steps, completed=run.step, numbers="", eta="?")
            self.bar.start()

    def step(self, run: RunState, record: dict | None) -> None:
        if run.rank != 0:
            return
        if self.bar is not None:
            fields = {} if record is None else {"numbers": summary(record)}
            self.bar.update(self.bar.task_ids[0], completed=run.step, eta=self._eta(run), **fields)
        elif record is not None:
            self._say(f"step {run.step}/{run.total_steps}  {summary(record)}  ETA {self._eta(run)}")

    def evaluated(self, run: RunState, record: dict) -> None:
        if run.rank == 0 and "eval/loss" in record:
            self._say(f"step {run.step}/{run.total_steps}  validation loss {record['eval/loss']:.4f}")

    def saved(self, run: RunState, done: Done) -> None:
        if run.rank == 0 and self.bar is None:
            took = f"{byte_size(done.size)} in {done.seconds:.2g} s, training stood still for {done.stall:.2g} s"
            self._say(f"step {run.step}/{run.total_steps}  saved {done.path} ({took})")

    def end(self, run: RunState, status: str) -> None:
        if run.rank != 0:
            return
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        took = duration(self.clock() - self.began)
        self._say(f"{run.directory}: {status} at step {run.step}/{run.total_steps} after {took}")

    def _eta(self, run: RunState) -> str:
        done = run.step - self.first_step
        return duration((self.clock() - self.began) / done * (run.total_steps - run.step)) if done > 0 else "?"

    def _say(self, line: str) -> None:
        """A line above the bar; a path with [brackets] is no markup."""
        self.terminal.print(line, markup=False)
        self.terminal.file.flush()
