"""metrics.jsonl: one JSON object a logged step, the record everything else is compared by."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

from sieve.data.disk import writing
from sieve.train.callbacks.callback import Callback
from sieve.train.rundir import METRICS_FILE, read_metrics

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pathlib import Path

    from sieve.train.saver import Done
    from sieve.train.state import RunState


class Jsonl(Callback):
    """Appends each record to metrics.jsonl, on rank 0.

    A line is written by one write() as soon as the step ends, so `kill -9` loses none; a checkpoint also waits until
    the disk has it. On resume, lines after the checkpoint's step are cut off: no step stands in the file twice. An
    evaluation belongs to the line of its step. A loss that is no number is written as NaN, as Python's json reads it.
    Lines that a full disk does not take are kept, and written as soon as it does.
    """

    def __init__(self) -> None:
        self.file: int | None = None
        self.lines: list[dict] = []  # from `offset` on: the last one, which may still change, and what is not written
        self.offset = 0
        self.broken = False

    def start(self, run: RunState) -> None:
        if run.rank != 0:
            return
        path = run.directory / METRICS_FILE
        kept = _keep(path, run.resumed_from or 0)
        self.file = os.open(path, os.O_WRONLY)
        self.lines = kept[-1:]  # a resumed run may owe this step its evaluation
        self.offset = os.fstat(self.file).st_size - sum(len(_encode(line)) for line in self.lines)

    def step(self, run: RunState, record: dict | None) -> None:
        if record is not None:
            self._put(record)

    def evaluated(self, run: RunState, record: dict) -> None:
        self._put(record)

    def saved(self, run: RunState, done: Done) -> None:
        if self.file is not None:
            _sync(self.file)

    def end(self, run: RunState, status: str) -> None:
        if self.file is not None:
            _sync(self.file)
            os.close(self.file)
            self.file = None

    def _put(self, record: dict) -> None:
        """Write `record` as a new line, or over the last line with its keys added when the step is the same."""
        if self.file is None:
            return
        if self.lines and record["step"] == self.lines[-1]["step"]:
            self.lines[-1] |= record
        else:
            self.lines.append(dict(record))
        texts = [_encode(line) for line in self.lines]
        try:
            _write(self.file, b"".join(texts), self.offset)
        except OSError as error:
            if not self.broken:
                log.warning("%s cannot be written: %s; its lines are kept, training goes on", METRICS_FILE, error.strerror)
            self.broken = True
            return
        self.broken = False
        self.offset += sum(map(len, texts[:-1]))
        self.lines = self.lines[-1:]


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        log.warning("%s may not be on the disk: %s", METRICS_FILE, error.strerror)


def _write(file: int, text: bytes, offset: int) -> None:
    """From `offset` to the file's new end, over what stands there and not after cutting it: no moment without either."""
    end = offset + len(text)
    while text:  # a nearly full disk takes a part
        written = os.pwrite(file, text, offset)
        text, offset = text[written:], offset + written
    os.ftruncate(file, end)


def _encode(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _keep(path: Path, last_step: int) -> list[dict]:
    """Leave only the rows of steps <= last_step in `path`, which is created if it is not there; returns them."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step] if path.is_file() and last_step else []
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("wb") as file:
            file.writelines(_encode(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    return rows
