"""Reading before it is asked for, in threads, so that a training loop finds its next step ready."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Any

import torch

from sieve.data.share import Share, read_share
from sieve.data.stream import Stream


class ReadAhead:
    """Endless iterator of a rank's shares from `state` on, in the order of steps.

    `workers` threads plan in turn, read at the same time and stay `prefetch` steps ahead each; with workers=0 a share
    is read when it is asked for. What a thread raises, the iterator raises at the step it belongs to. pin: the CUDA
    device for whose copies memory is page-locked, or None.

    Threads and not processes: `sieve bench data` has a share from another process take more of the loop's time, to be
    received, than to be read in the loop itself, while a thread takes next to none. Threads also hear no signals.
    """

    def __init__(
        self, stream: Stream, state: dict[str, Any], *, rank: int, world_size: int, workers: int, prefetch: int,
        pin: torch.device | None = None,
    ):
        self._stream, self._state, self._rank, self._world_size, self._pin = stream, state, rank, world_size, pin
        self._planning = threading.Lock()
        self._shares: queue.SimpleQueue[Future[Share]] = queue.SimpleQueue()
        self._room = threading.Semaphore(workers * prefetch)
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"data-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Share:
        if self._stopped:
            raise StopIteration
        if not self._threads:
            return self._next(None)
        try:
            share = self._shares.get().result()
        except BaseException:
            self._stopped = True
            raise
        self._room.release()
        return share

    def close(self) -> None:
        """End the threads; no share follows."""
        self._stopped = True
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join()

    def _next(self, slot: Future[Share] | None) -> Share:
        """Plan and read one step; `slot` is queued in the order of plans."""
        with self._planning:
            if slot is not None:
                self._shares.put(slot)
            plan = self._stream.plan(self._state)
            self._state = plan.state
        share = read_share(self._stream, plan, self._rank, self._world_size)
        return share if self._pin is None else share.pin_memory()

    def _work(self) -> None:
        if self._pin is not None:
            torch.cuda.set_device(self._pin)  # or page-locking would open a context on the first device
        while True:
            self._room.acquire()
            if self._stopped:
                return
            slot: Future[Share] = Future()
            try:
                slot.set_result(self._next(slot))
            except BaseException as error:  # the loop's to raise, whatever it is
                slot.set_exception(error)
                return
