"""SIGINT and SIGTERM as a flag that the training loop polls; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """A context in which SIGINT and SIGTERM set `requested`; outside, whatever handled them before handles them again.

    No more is done in the handler than to set the flag and to say so: a step must end and a checkpoint be written
    before the process may go. Children that are started meanwhile get the signals too (a terminal's Ctrl-C reaches the
    whole group) and have to ignore them themselves.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # the signal's name
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested is not None:
            _say(f"\n{name} again: ending at once; the last checkpoint stands\n")
            os._exit(128 + number)
        self.requested = name
        _say(f"\n{name}: finishing this step and saving; once more ends at once\n")


def _say(text: str) -> None:
    os.write(2, text.encode())  # print() is not reentrant
