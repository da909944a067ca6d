"""The copy of a moment's state in host memory, from which a thread writes while training goes on.

On a GPU the copy runs on a stream of its own, beside the next step's forward and backward, which only read the state:

    take    on the host: everything is enqueued behind the step's work, and training goes on at once
    fence   before the next update: from here on the GPU writes nothing before the copy has read it
    wait    in the thread: the host waits until the copy is whole, before the first byte goes to the disk

Memory that a GPU copies to is page-locked, and taken again by every later copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sieve.train.partition import Piece
from sieve.train.tensorfile import write_tensors

BUFFER = "buffer"


class Copier(Protocol):
    """How bytes get from the state's device to host memory. See the module for who calls what."""

    def empty(self, source: Tensor) -> Tensor:
        """Host memory for a copy of `source`, of its shape and dtype. Called by either thread."""

    def copy(self, now: Sequence[tuple[Tensor, Tensor]], later: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy pairs (into, source). `now`: sources that may change at any moment after this call's return;
        `later`: such that do not before the next `fence`."""

    def fence(self) -> None:
        """What the calling thread does to the sources from here on comes after the copy."""

    def wait(self) -> None:
        """Return when the copies may be read."""


class DirectCopier:
    """For a state in host memory: it is copied at once."""

    def empty(self, source: Tensor) -> Tensor:
        return torch.zeros(source.shape, dtype=source.dtype)

    def copy(self, now: Sequence[tuple[Tensor, Tensor]], later: Sequence[tuple[Tensor, Tensor]]) -> None:
        for into, source in (*now, *later):
            into.copy_(source)

    def fence(self) -> None:
        pass

    def wait(self) -> None:
        pass


class StreamCopier:
    """For a state on the CUDA `device`: small things that anything may change on the stream that changes them, the rest
    on a stream of the copier's own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._copied = device, torch.cuda.Stream(device), torch.cuda.Event()
        self._fenced = True

    def empty(self, source: Tensor) -> Tensor:
        with torch.cuda.device(self._device):  # or page-locking would open a context on the first device
            return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).zero_()  # now the system gives the pages

    def copy(self, now: Sequence[tuple[Tensor, Tensor]], later: Sequence[tuple[Tensor, Tensor]]) -> None:
        for into, source in now:
            into.copy_(source, non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for into, source in later:
                into.copy_(source, non_blocking=True)
            self._copied.record()
        self._fenced = False

    def fence(self) -> None:
        if not self._fenced:
            self._fenced = True
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        self._copied.synchronize()


def copier_for(device: torch.device) -> Copier:
    return StreamCopier(device) if device.type == "cuda" else DirectCopier()


class HostCopy:
    """A copy of one moment's state, in buffers that the next copy takes again. One at a time: `take` after the thread is
    through with the one before."""

    def __init__(self, copier: Copier | None = None) -> None:
        self._copier = copier or DirectCopier()
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[str, int] = {}  # parameter -> its place among the counts
        self._counts = torch.zeros(0)

    def reserve(self, pieces: Sequence[Piece], buffers: dict[str, Tensor]) -> None:
        """Get the memory that a copy of these will take: that is most of the time of a first one."""
        sources = _named(pieces, buffers)
        kept = {key: t for key, t in self._tensors.items() if key in sources and t.shape == sources[key].shape}
        self._tensors = {key: kept[key] if key in kept else self._copier.empty(source) for key, source in sources.items()}

    @torch.no_grad()
    def take(self, pieces: Sequence[Piece], buffers: dict[str, Tensor]) -> None:
        """Begin to copy. `pieces` must not be changed until `fence`; `buffers` may be."""
        self.reserve(pieces, buffers)
        counts = {id(piece.step): piece.step for piece in pieces}  # parameters may share one
        order = {key: place for place, key in enumerate(counts)}
        self._names = {piece.name: order[id(piece.step)] for piece in pieces}
        now = []
        if counts:
            # A look at each would have the host wait for the step's end.
            stacked = torch.stack([count.detach().reshape(()) for count in counts.values()])
            if self._counts.shape != stacked.shape or self._counts.dtype != stacked.dtype:
                self._counts = self._copier.empty(stacked)
            now.append((self._counts, stacked))
        state = _named(pieces, {})
        now += [(self._tensors[key], source) for key, source in _named([], buffers).items()]
        self._copier.copy(now, [(self._tensors[key], source) for key, source in state.items()])

    def fence(self) -> None:
        """Before `pieces` are changed, by the thread that changes them."""
        self._copier.fence()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.nbytes for t in self._tensors.values())

    def write(self, path: Path) -> tuple[int, str]:
        """Into a file; size and sha256. The optimizer's count of steps goes into the header."""
        self._copier.wait()
        layout = {key: (t.dtype, list(t.shape)) for key, t in self._tensors.items()}
        counts = self._counts.tolist()
        steps = {f"step:{name}": str(int(counts[place])) for name, place in self._names.items()}
        return write_tensors(path, layout, self._tensors.__getitem__, steps)


def _named(pieces: Sequence[Piece], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that they have in a file."""
    named = {f"{kind}:{p.name}:{p.start}": t for p in pieces for kind, t in p.tensors.items()}
    return named | {f"{BUFFER}:{name}:0": buffer for name, buffer in buffers.items()}
