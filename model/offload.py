"""What a checkpointed layer keeps, in host memory between its forward and its backward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Offload:
    """Moves the inputs of checkpointed layers to the host and fetches them back ahead of the backward.

    On CUDA both copies run on one side stream, in the order in which they were asked for, so that a buffer is never
    overwritten before it has been read. A layer's input is let go one layer later: by then the stream that computes waits
    for the copy (the host never does), so that the device holds two inputs in the forward, and the same in the backward,
    where unpacking one starts to fetch the one before. Buffers are page-locked and kept from step to step. On the CPU it
    is a plain copy.

    After OffloadActivations of torchtune and torch.autograd.graph.save_on_cpu.
    packed, bytes, fetched: how many inputs went to the host, their bytes, and how many came back; buffers: made so far.
    """

    def __init__(self) -> None:
        self.packed = self.bytes = self.fetched = self.buffers = 0
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._newest: _Kept | None = None  # whose copy on the device has not been let go

    @contextlib.contextmanager
    def of(self, x: Tensor) -> Iterator[None]:
        """Of what autograd saves within, `x` [T, hidden] goes to the host and everything else stays where it is."""
        made: list[_Kept] = []  # `pack` itself must not hold x: autograd may keep it as long as the graph
        address, layout = x.data_ptr(), (x.device, x.shape, x.stride(), x.dtype)

        def pack(saved: Tensor) -> Any:
            if (saved.device, saved.shape, saved.stride(), saved.dtype) != layout or saved.data_ptr() != address:
                return saved
            if not made:
                made.append(self._send(saved))
            return made[0]

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield

    def _send(self, x: Tensor) -> _Kept:
        before = self._newest
        if before is not None:
            before.let_go()
        kept = self._newest = _Kept(self, x, before)
        self.packed += 1
        self.bytes += x.nbytes
        return kept

    def _buffer(self, x: Tensor) -> Tensor:
        key = x.shape, x.dtype
        if not self._free.get(key):
            self._free = {}  # those of another phase's rows
            self.buffers += 1
            return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        return self._free[key].pop()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class _Kept:
    """One layer's input: in a buffer on the host, and at times on the device."""

    def __init__(self, owner: Offload, x: Tensor, before: _Kept | None) -> None:
        self.owner, self.device = owner, x.device
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.host, self.here, self.event = owner._buffer(x), x, None
        self._copy(self.host, x)

    def _copy(self, into: Tensor, source: Tensor) -> None:
        if self.device.type != "cuda":
            into.copy_(source)
            return
        side = self.owner._side(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            into.copy_(source, non_blocking=True)
            self.event = side.record_event()

    def _wait(self) -> None:
        """What the current stream does from here on comes after the copy."""
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)
            self.event = None

    def let_go(self) -> None:
        """Of the input on the device: its memory may be used again behind the copy."""
        if self.here is not None:
            self._wait()
            self.here = None

    def fetch(self) -> None:
        if self.here is None:
            # Of the stream that computes: what used this memory before is done when the side stream begins.
            self.here = torch.empty_like(self.host, device=self.device)
            self._copy(self.here, self.host)
            self.owner.fetched += 1

    def take(self) -> Tensor:
        """The input on the device; the one before it is on its way from here on."""
        self.fetch()
        self._wait()
        x, self.here = self.here, None
        if self.owner._newest is self:
            self.owner._newest = None
        before = self.before()
        if before is not None:
            before.fetch()
        return x

    def __del__(self) -> None:
        if self.event is not None and self.here is not None:  # dropped without a backward
            self.here.record_stream(self.owner._side(self.device))
        self.owner._free.setdefault((self.host.shape, self.host.dtype), []).append(self.host)


def _unpack(saved: Any) -> Tensor:
    return saved.take() if isinstance(saved, _Kept) else saved
