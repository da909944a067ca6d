"""SIGINT and SIGTERM as a flag that the training loop polls; a second signal ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

REPEAT = 2.0  # seconds
_HEARD = (signal.SIGINT, signal.SIGTERM)
_LOOK = 0.5  # seconds between two looks for a file


class Stopped(BaseException):
    """A signal came while there was nothing to save. Like KeyboardInterrupt no Exception, so that nobody swallows it."""


class StopSignal:
    """A context in which SIGINT and SIGTERM set `requested`; outside, whatever handled them before handles them again.

    A second signal ends the process. The same one within REPEAT seconds is no second one: a supervisor that signals
    every process of a job, and a parent that passes on what it gets, reach a process twice. Signals are counted by a
    thread that the system wakes, since Python's handlers only run when the main thread is between two instructions,
    which it is not in a collective that hangs.

    Children that are started meanwhile get the signals too (a terminal's Ctrl-C reaches the whole group); see `shielded`.
    Forked ones neither handle nor count them for us.

    late: called once, by that thread, when the context has not been left `seconds` after the first signal; 0: never.
    """

    def __init__(self, seconds: float = 0.0, late: Callable[[], None] = lambda: None) -> None:
        self._seconds, self._late = seconds, late
        self.requested: str | None = None  # the signal's name
        self.since: float | None = None  # time.monotonic() of it
        self._before: dict[int, object] = {}
        self._raising = False

    def __enter__(self) -> StopSignal:
        self._owner = os.getpid()
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in _HEARD:
            self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._count, name="signals", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=self._forget)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        signal.set_wakeup_fd(self._wakeup)
        self._theirs.close()  # the thread reads what is left, and the end
        self._thread.join()
        self._ours.close()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped in the main thread instead of waiting to be asked for."""
        self._raising = True
        try:
            if self.requested is not None:
                raise Stopped(self.requested)
            yield
        finally:
            self._raising = False

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside, no SIGINT or SIGTERM to the whole group ends what this thread, or one that it starts, has started:
        the compilers of Triton (ptxas) and Inductor (g++, worker processes), without whose results a step cannot be
        finished. Programs inherit which signals are blocked, unlike how they are handled. This process still hears
        them, by the thread that counts.

        Only for what polls `requested`: nothing in this thread is interrupted meanwhile.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        self.requested = self.requested or signal.Signals(number).name
        if self._raising:
            self._raising = False  # once: what is raised has to get through
            raise Stopped(self.requested)

    def _count(self) -> None:
        """In the thread: each byte is a signal's number."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        seen: dict[int, float] = {}
        while data := self._receive():
            number, now = data[0], time.monotonic()
            if number not in _HEARD:
                continue
            name = signal.Signals(number).name
            if not seen:
                self.since = now
                self.requested = self.requested or name
                todo = "ending" if self._raising else "finishing this step and saving"
                _say(f"\n{name}: {todo}; once more ends at once\n")
            elif now - seen.get(number, -REPEAT) >= REPEAT:
                _say(f"\n{name} again: ending at once; the last checkpoint stands\n")
                os._exit(128 + number)
            seen.setdefault(number, now)

    def _receive(self) -> bytes:
        """The next byte; none at the end. Tells `late` when it is time."""
        if self._seconds and self.since is not None:
            self._ours.settimeout(max(1e-3, self.since + self._seconds - time.monotonic()))
        try:
            return self._ours.recv(1)
        except TimeoutError:
            self._seconds = 0.0
            self._ours.settimeout(None)
            self._late()
            return self._ours.recv(1)

    def _forget(self) -> None:
        """In a forked child: its signals are its own affair, and must not be counted as ours."""
        if self._before and os.getpid() != self._owner:
            signal.set_wakeup_fd(-1)


class SaveRequest:
    """`touch FILE` asks for a checkpoint; the file is removed when that has been seen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = 0.0

    def take(self) -> bool:
        """Whether there is a new request. Looks at the disk now and then only."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _LOOK
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError:  # on a read-only disk nothing can be saved either
            return False
        return True


def _say(text: str) -> None:
    os.write(2, text.encode())  # print() is not reentrant
