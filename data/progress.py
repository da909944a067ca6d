"""How far a long build is: a bar where a person watches, a log line now and then where none does."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

import rich.progress
from rich.console import Console

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


class Progress:
    """A context that shows documents, tokens and tokens per second on stderr; on a terminal as a bar."""

    def __init__(self, label: str, *, terminal: bool | None = None, before: int = 0, unit: str = "tokens"):
        """label: what is being done. terminal: None: whether stderr is one. before: tokens of an earlier start, which
        are no part of the speed. unit: what is counted; bytes are counted in files."""
        self._label, self._before, self._unit = label, before, unit
        self._things = "files" if unit == "bytes" else "documents"
        self._documents, self._tokens = 0, before
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(), rich.progress.TextColumn("{task.fields[counts]}"),
                rich.progress.TimeRemainingColumn(), console=Console(stderr=True),
            )

    def __enter__(self) -> Progress:
        self._start = self._logged = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=1.0, counts="")
        return self

    def update(self, done: float, documents: int, tokens: int) -> None:
        """done: share of the work, 0 to 1. documents, tokens: finished so far."""
        self._documents, self._tokens = documents, tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, counts=self._counts(now))
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info("%s: %.0f %%, %s", self._label, 100 * done, self._counts(now))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if self._bar is not None:
            if kind is None:
                self._bar.update(self._task, completed=1.0, counts=self._counts(now))
            self._bar.stop()
        if kind is None:
            logger.info("%s: %s in %.1f s", self._label, self._counts(now), now - self._start)

    def _counts(self, now: float) -> str:
        rate = (self._tokens - self._before) / max(now - self._start, 1e-3)
        return f"{self._documents:,} {self._things}, {self._tokens:,} {self._unit}, {rate:,.0f} {self._unit}/s"
