"""Shuffling documents that have no index: window by window, so that two integers are all the state there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from sieve.data.shuffle import DocumentOrder

T = TypeVar("T")


class WindowShuffle(Generic[T]):
    """Iterator of (item, state) over a stream's items, permuted within consecutive windows of `window` items.

    The permutation of a window is a pure function of the seed and the window's place, so that the state is where the
    window begins and how many of its items have been given out. Going on re-reads the window, no more. A reservoir that
    is refilled item by item would mix over longer distances, but its state is the text in it: trainers that leave it
    out of their checkpoints skip and repeat documents at each resume.
    """

    def __init__(
        self, items_from: Callable[[int], Iterator[T]], window: int, seed: int, state: dict[str, Any] | None = None
    ):
        """items_from(n): the stream's items from number n on, the same ones every time. state: of an item, to go on
        behind it. Raises ValueError when `state` is of another seed or window."""
        if window < 1:
            raise ValueError(f"window={window}; a shuffle needs a window of at least one document")
        self._items_from, self._window, self._seed = items_from, window, seed
        start = {"start": 0, "given": 0, "window": window, "seed": seed}
        for key in ("window", "seed") if state is not None else ():
            if state[key] != start[key]:
                raise ValueError(f"cannot resume a shuffle with {key}={state[key]} as one with {key}={start[key]}")
        self._state = dict(state or start)

    def __iter__(self) -> Iterator[tuple[T, dict[str, Any]]]:
        start, given = self._state["start"], self._state["given"]
        items = self._items_from(start)
        while block := list(islice(items, self._window)):
            order = DocumentOrder(len(block), (self._seed << 64) + start).span(0, 0, len(block)).tolist()
            for number in range(given, len(block)):
                yield block[order[number]], {**self._state, "start": start, "given": number + 1}
            start, given = start + len(block), 0
