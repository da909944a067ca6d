"""New tokens of several sequences on their way into a cache: where each stands, and which blocks they complete."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import CompressedSlots, Packing


@dataclass(frozen=True)
class Chunk:
    """T new tokens of B sequences laid end to end.

    packing: their layout, a sequence's new tokens as a document. past, count: int32 [B], tokens a sequence has already
        and gets now. position: int32 [T], in the sequence. width: the most new tokens of one sequence. longest: at least
        every sequence's length afterwards, on the host. fresh: nothing came before, so that training's forward serves.
    slots: where phi's blocks begin, in `packing`'s tokens when fresh, else in P tokens a sequence: the past tokens from
        its first incomplete block on, then the new ones. raw_index: int64 [B * P], those in the cached tokens [B * l]
        followed by the new [T]; raw_position: int64 [B, P], their positions. Both None when fresh.
    tail_index: int64 [B, l], in what phi compresses, the tokens from the next incomplete block on.
    block_slot, block_number: int64 [B, N], the slot and number of the blocks that may be complete now; block_valid: are.
    """

    packing: Packing
    past: Tensor
    count: Tensor
    position: Tensor
    width: int
    longest: int
    fresh: bool
    slots: CompressedSlots
    raw_index: Tensor | None
    raw_position: Tensor | None
    tail_index: Tensor
    block_slot: Tensor
    block_number: Tensor
    block_valid: Tensor

    @property
    def batch(self) -> int:
        return self.past.numel()

    @classmethod
    def of(cls, past: Tensor, counts: Sequence[int], geometry: Geometry, longest: int, *, fresh: bool) -> Chunk:
        """counts[b] tokens after the past[b] (int32 [B], on the device) that sequence b has. longest: see above."""
        device, width, T = past.device, max(counts), sum(counts)
        if min(counts) == width:  # nothing is copied to the device, so that a captured graph may hold it
            ends = torch.arange(len(counts) + 1, dtype=torch.int32, device=device) * width
        else:
            ends = torch.tensor(list(itertools.accumulate(counts, initial=0)), dtype=torch.int32, device=device)
        packing = Packing.of(ends, T, width)
        begin = packing.cu_seqlens[:-1].long()
        count = packing.cu_seqlens.diff()
        l, d = geometry.kernel_size, geometry.kernel_stride
        first = _blocks(past, geometry).long() * d  # the first incomplete block's first token [B]
        held = (past + count).long() - first
        next_first = _blocks(past + count, geometry).long() * d - first
        if fresh:
            slots = CompressedSlots.of(packing, l, d)
            N, total, base, slot0 = width // d, T, begin, begin // d
            raw_index = raw_position = None
        else:
            P = -(-(l - 1 + width) // d) * d
            N, total, base = P // d, past.numel() * P, torch.arange(past.numel(), device=device) * P
            slot0 = base // d
            place = torch.arange(P, device=device)
            pending = past.long() - first
            old = torch.arange(past.numel(), device=device)[:, None] * l + place
            new = (past.numel() * l + begin[:, None] + place - pending[:, None]).clamp(max=past.numel() * l + T - 1)
            raw_index = torch.where(place < pending[:, None], old, new).flatten()
            raw_position = first[:, None] + place
            local = torch.arange(N, device=device) * d
            slots = CompressedSlots(
                (base[:, None] + local).flatten().int(), (first[:, None] + local).flatten().int(),
                (local + l <= held[:, None]).flatten(), (local + d <= held[:, None]).flatten(),
            )
        block = torch.arange(N, device=device)
        tail = base[:, None] + next_first[:, None] + torch.arange(l, device=device)
        return cls(
            packing, past, count, past[packing.doc] + packing.position, width, longest, fresh, slots, raw_index,
            raw_position, tail.clamp_(max=total - 1),
            (slot0[:, None] + block).clamp_(max=max(slots.start.numel() - 1, 0)), first[:, None] // d + block,
            block * d + l <= held[:, None],
        )

    @functools.cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """int64 [T] each: every new token's sequence, and its position there."""
        return self.packing.doc.long(), self.position.long()

    @functools.cached_property
    def _last(self) -> dict[int, Tensor]:
        return {}

    def last(self, size: int) -> Tensor:
        """ring(size) after the new tokens; worked out for the first layer that asks."""
        if size not in self._last:
            self._last[size] = self.ring(size, self.past + self.count)
        return self._last[size]

    @functools.cached_property
    def block_row(self) -> Tensor:
        """int64 [B, N]: the sequence of each of block_number's blocks."""
        return torch.arange(self.batch, device=self.past.device)[:, None].expand_as(self.block_number)

    @functools.cached_property
    def _block_place(self) -> dict[int, Tensor]:
        return {}

    def block_place(self, spare: int) -> Tensor:
        """int64 [B, N]: block_number, or `spare` for what is not complete; worked out for the first layer that asks."""
        if spare not in self._block_place:
            self._block_place[spare] = torch.where(self.block_valid, self.block_number, spare)
        return self._block_place[spare]

    @property
    def new_position(self) -> Tensor:
        """int32 [B, width]: positions of the new tokens, -1 past a sequence's last."""
        place = torch.arange(self.width, dtype=torch.int32, device=self.past.device)
        return torch.where(place < self.count[:, None], self.past[:, None] + place, -1)

    @functools.cached_property
    def query(self) -> Tensor:
        """int32 [B, width]: as new_position, with the last one repeated instead of -1."""
        place = torch.arange(self.width, dtype=torch.int32, device=self.past.device)
        return (self.past[:, None] + torch.minimum(place, self.count[:, None] - 1)).clamp_(min=0)

    def pad(self, x: Tensor) -> Tensor:
        """Packed x [T, ...] as [B, width, ...]; a place past a sequence's last token repeats some token."""
        if x.shape[0] == self.batch * self.width:
            return x.unflatten(0, (self.batch, self.width))
        place = torch.arange(self.width, device=x.device)
        index = (self.packing.cu_seqlens[:-1, None] + place).clamp(max=x.shape[0] - 1)
        return x[index]

    def unpad(self, x: Tensor) -> Tensor:
        """[B, width, ...] back to packed [T, ...]."""
        if self.packing.total_tokens == self.batch * self.width:
            return x.flatten(0, 1)
        return x[self.packing.doc.long(), self.packing.position.long()]

    def ring(self, size: int, length: Tensor) -> Tensor:
        """int32 [B, size]: which position lies in each place of a window of `size` after length [B] tokens; -1: none."""
        place = torch.arange(size, dtype=torch.int32, device=length.device)
        last = length[:, None] - 1
        return (last - torch.remainder(last - place, size)).clamp_(min=-1)


def _blocks(length: Tensor, geometry: Geometry) -> Tensor:
    """How many compressed blocks `length` tokens complete."""
    done = torch.div(length - geometry.kernel_size, geometry.kernel_stride, rounding_mode="floor") + 1
    return done.clamp(min=0)
