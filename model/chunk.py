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
        and gets now; pasts, counts: the same on the host, but in a captured step, where pasts are those of the capture.
    position: int32 [T], in the sequence. width: the most new tokens of one sequence. longest: at least every sequence's
        length afterwards, on the host. fresh: nothing came before, so that training's forward serves.
    slots: where phi's blocks begin, in `packing`'s tokens when fresh, else in `places` tokens a sequence: the past tokens
        from its first incomplete block on, then the new ones. begin: int64 [B], where those of a sequence begin; first:
        int64 [B], the position of that token.

    What one layer's cache takes in otherwise than another's is worked out for the first that asks.
    """

    packing: Packing
    past: Tensor
    count: Tensor
    pasts: tuple[int, ...]
    counts: tuple[int, ...]
    position: Tensor
    width: int
    longest: int
    fresh: bool
    slots: CompressedSlots
    begin: Tensor
    first: Tensor
    geometry: Geometry

    @property
    def batch(self) -> int:
        return self.past.numel()

    @property
    def step(self) -> bool:
        """Whether every sequence, of which there is something already, gets one new token."""
        return self.width == 1 and self.packing.total_tokens == self.batch and not self.fresh

    @classmethod
    def of(
        cls, past: Tensor, pasts: Sequence[int], counts: Sequence[int], geometry: Geometry, longest: int, *, fresh: bool
    ) -> Chunk:
        """counts[b] tokens after the past[b] (int32 [B], on the device; pasts on the host) that sequence b has. longest: see
        above."""
        device, width, T = past.device, max(counts), sum(counts)
        if min(counts) == width:  # nothing is copied to the device, so that a captured graph may hold it
            ends = torch.arange(len(counts) + 1, dtype=torch.int32, device=device) * width
        else:
            ends = torch.tensor(list(itertools.accumulate(counts, initial=0)), dtype=torch.int32, device=device)
        packing = Packing.of(ends, T, width)
        count = packing.cu_seqlens.diff()
        l, d = geometry.kernel_size, geometry.kernel_stride
        first = _blocks(past, geometry).long() * d  # the first incomplete block's first token [B]
        if fresh:
            slots, begin = CompressedSlots.of(packing, l, d), packing.cu_seqlens[:-1].long()
        else:
            places = _places(width, geometry)
            begin = torch.arange(past.numel(), device=device) * places
            held = (past + count).long() - first
            local = torch.arange(places // d, device=device) * d
            slots = CompressedSlots(
                (begin[:, None] + local).flatten().int(), (first[:, None] + local).flatten().int(),
                (local + l <= held[:, None]).flatten(), (local + d <= held[:, None]).flatten(), any_filling=True,
            )
        position = past[packing.doc] + packing.position
        return cls(
            packing, past, count, tuple(pasts), tuple(counts), position, width, longest, fresh, slots, begin, first, geometry
        )

    @functools.cached_property
    def raw_position(self) -> Tensor:
        """int64 [B, places], unless fresh: positions of the tokens that phi compresses."""
        return self.first[:, None] + torch.arange(_places(self.width, self.geometry), device=self.past.device)

    @functools.cached_property
    def raw_index(self) -> Tensor:
        """int64 [B * places], unless fresh: those tokens in the cached ones [B * l] followed by the new [T]."""
        l, T = self.geometry.kernel_size, self.packing.total_tokens
        place = torch.arange(_places(self.width, self.geometry), device=self.past.device)
        pending = (self.past.long() - self.first)[:, None]
        old = torch.arange(self.batch, device=self.past.device)[:, None] * l + place
        new = self.batch * l + self.packing.cu_seqlens[:-1, None].long() + place - pending
        return torch.where(place < pending, old, new.clamp(max=self.batch * l + T - 1)).flatten()

    @functools.cached_property
    def tail_index(self) -> Tensor:
        """int64 [B, l], in what phi compresses, the tokens from the next incomplete block on."""
        l, d = self.geometry.kernel_size, self.geometry.kernel_stride
        total = self.packing.total_tokens if self.fresh else self.batch * _places(self.width, self.geometry)
        next_first = _blocks(self.past + self.count, self.geometry).long() * d - self.first
        tail = (self.begin + next_first)[:, None] + torch.arange(l, device=self.past.device)
        return tail.clamp_(max=total - 1)

    @functools.cached_property
    def block(self) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [B, N] twice, bool [B, N]: the slot and the number of the blocks that may be complete now, and which are."""
        l, d = self.geometry.kernel_size, self.geometry.kernel_stride
        N = (self.width if self.fresh else _places(self.width, self.geometry)) // d
        place = torch.arange(N, device=self.past.device)
        slot = ((self.begin // d)[:, None] + place).clamp_(max=max(self.slots.start.numel() - 1, 0))
        held = (self.past + self.count).long() - self.first
        return slot, self.first[:, None] // d + place, place * d + l <= held[:, None]

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
        """int64 [B, N]: the sequence of each of `block`'s."""
        return torch.arange(self.batch, device=self.past.device)[:, None].expand_as(self.block[1])

    @functools.cached_property
    def _block_place(self) -> dict[int, Tensor]:
        return {}

    def block_place(self, spare: int) -> Tensor:
        """int64 [B, N]: the place of each of `block`'s, `spare` for what is not complete; for the first layer that asks."""
        if spare not in self._block_place:
            _, number, complete = self.block
            self._block_place[spare] = torch.where(complete, number, spare)
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


def _places(width: int, geometry: Geometry) -> int:
    """Tokens a sequence that phi compresses: pending ones and up to `width` new, in whole strides."""
    return -(-(geometry.kernel_size - 1 + width) // geometry.kernel_stride) * geometry.kernel_stride


def _blocks(length: Tensor, geometry: Geometry) -> Tensor:
    """How many compressed blocks `length` tokens complete."""
    done = torch.div(length - geometry.kernel_size, geometry.kernel_stride, rounding_mode="floor") + 1
    return done.clamp(min=0)
