"""Layers' inputs in the host's memory between forward and backward, copied beside the computation.

The mechanism is torch's saved-tensor hooks, as in torch.autograd.graph.save_on_cpu; that an input is fetched one layer ahead
of its use is from OffloadActivations of torchtune (https://github.com/meta-pytorch/torchtune).
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Key = tuple[torch.Size, torch.dtype]

# Inputs on their way to the host at once. Each is held until the computation has waited for its copy: the allocator could give
# its memory to nobody before if it were told to watch the copy's stream, since the host is far ahead of the device.
LEAVING = 2


class Offload:
    """For the layers of one model on one device. Each layer's forward runs within `keep`.

    On a GPU the copies run on streams of their own and the host waits for nothing. Page-locked buffers are used again from
    step to step: as many bytes as all layers' inputs of a micro-batch have. On the CPU it is a plain copy.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if cuda else None  # to the host, from it
        self.free: defaultdict[Key, list[tuple[Tensor, torch.cuda.Event | None]]] = defaultdict(list)
        self.last: weakref.ref[_Kept] | None = None  # of the layer before
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def keep(self, x: Tensor) -> Iterator[None]:
        """What is saved of x [T, hidden] for the backward goes to the host; other tensors stay where they are."""
        place, kept = (x.data_ptr(), x.shape, x.dtype), None

        def pack(saved: Tensor) -> Any:
            nonlocal kept
            if (saved.data_ptr(), saved.shape, saved.dtype) != place:
                return saved
            if kept is None:
                kept = _Kept(self, saved)
            return kept

        with saved_tensors_hooks(pack, lambda saved: saved.fetch() if isinstance(saved, _Kept) else saved):
            yield
        if kept is not None:
            kept.before, self.last = self.last, weakref.ref(kept)
        self.let_go(LEAVING)

    def let_go(self, but: int) -> None:
        """Of inputs that were to leave, all `but` so many, as soon as the present stream's work gets here."""
        while len(self.leaving) > but:
            x, copied = self.leaving.popleft()
            torch.cuda.current_stream(x.device).wait_event(copied)
            del x

    def buffer(self, x: Tensor) -> Tensor:
        """Room on the host for `x`; what was read from it before has been, where the stream to the host gets there."""
        free = self.free[x.shape, x.dtype]
        if not free:
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=self.streams is not None)
        found, read = free.pop()
        if read is not None:
            self.streams[0].wait_event(read)
        return found


class _Kept:
    """One layer's input on the host, for as long as autograd's graph has it. before: that of the layer below."""

    def __init__(self, offload: Offload, x: Tensor) -> None:
        self.offload, self.device = offload, x.device
        self.before: weakref.ref[_Kept] | None = None
        self._fetched: Tensor | None = None
        self._read: torch.cuda.Event | None = None
        self.host = offload.buffer(x)
        if offload.streams is None:
            self.host.copy_(x)
            return
        out = offload.streams[0]
        out.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(out), torch.no_grad():
            self.host.copy_(x, non_blocking=True)
        offload.leaving.append((x.detach(), out.record_event()))

    def fetch(self) -> Tensor:
        """The input, on its device; the layer below's is on its way from then on."""
        self.offload.let_go(0)
        self._start()
        found, self._fetched = self._fetched, None
        if self._read is not None:
            torch.cuda.current_stream(self.device).wait_event(self._read)
        below = None if self.before is None else self.before()
        if below is not None:
            below._start()
        return found

    def _start(self) -> None:
        if self._fetched is not None:
            return
        if self.offload.streams is None:
            self._fetched = self.host.clone()
            return
        out, back = self.offload.streams
        self._fetched = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        back.wait_stream(torch.cuda.current_stream(self.device))  # whose memory it may have been until now
        back.wait_stream(out)
        with torch.cuda.stream(back), torch.no_grad():
            self._fetched.copy_(self.host, non_blocking=True)
        self._read = back.record_event()

    def __del__(self) -> None:
        if self._fetched is not None and self._read is not None:  # for nothing: its memory is still being written to
            torch.cuda.current_stream(self.device).wait_event(self._read)
        self.offload.free[self.host.shape, self.host.dtype].append((self.host, self._read))
