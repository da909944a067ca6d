"""metrics.jsonl: one JSON object a logged step, the record everything else is compared by."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from sieve.train.callbacks.callback import Callback
from sieve.train.rundir import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from pathlib import Path

    from sieve.train.saver import Done
    from sieve.train.state import RunState


class Jsonl(Callback):
    """Appends each record to metrics.jsonl, on rank 0.

    A line is written by one write() as soon as the step ends, so `kill -9` loses none; a checkpoint also waits until
    the disk has it. On resume, lines after the checkpoint's step are cut off: no step stands in the file twice. An
    evaluation belongs to the line of its step. A loss that is no number is written as NaN, as Python's json reads it.
    """

    def __init__(self) -> None:
        self.file: int | None = None
        self.line: dict = {}
        self.offset = 0

    def start(self, run: RunState) -> None:
        if run.rank != 0:
            return
        path = run.directory / METRICS_FILE
        kept = _keep(path, run.resumed_from or 0)
        self.file = os.open(path, os.O_WRONLY)
        self.line = kept[-1] if kept else {}  # a resumed run may owe this step its evaluation
        self.offset = os.fstat(self.file).st_size - (len(_encode(self.line)) if kept else 0)

    def step(self, run: RunState, record: dict | None) -> None:
        if record is not None:
            self._put(record)

    def evaluated(self, run: RunState, record: dict) -> None:
        self._put(record)

    def saved(self, run: RunState, done: Done) -> None:
        if self.file is not None:
            os.fsync(self.file)

    def end(self, run: RunState, status: str) -> None:
        if self.file is not None:
            os.fsync(self.file)
            os.close(self.file)
            self.file = None

    def _put(self, record: dict) -> None:
        """Write `record` as a new line, or over the last line with its keys added when the step is the same."""
        if self.file is None:
            return
        if self.line and record["step"] == self.line["step"]:
            self.line |= record
        else:
            self.offset = os.fstat(self.file).st_size
            self.line = dict(record)
        text = _encode(self.line)
        os.pwrite(self.file, text, self.offset)  # over the shorter line, not after cutting it: no moment without either
        os.ftruncate(self.file, self.offset + len(text))


def _encode(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _keep(path: Path, last_step: int) -> list[dict]:
    """Leave only the rows of steps <= last_step in `path`, which is created if it is not there; returns them."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step] if path.is_file() and last_step else []
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.writelines(_encode(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return rows
