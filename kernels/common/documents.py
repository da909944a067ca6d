"""Documents of a packed row as padded batches: what dense torch code works on, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sieve.kernels.nsa.layout import Packing


@dataclass(frozen=True)
class DocumentBatch:
    """B documents of similar length, padded to L tokens at their ends.

    token: int64 [B, L], packed index of each place; a padded place repeats a token of the row. It lies after every
        real token of its document, so a causal mask hides it, and `Documents.join` drops its output.
    first: int64 [B], packed index of each document's first token.
    """

    token: Tensor
    first: Tensor

    @property
    def length(self) -> int:
        return self.token.shape[1]

    def take(self, x: Tensor) -> Tensor:
        """Rows of packed x [T, ...] as [B, L, ...]."""
        return x.index_select(0, self.token.flatten()).unflatten(0, self.token.shape)

    def heads(self, x: Tensor, groups: int) -> Tensor:
        """Packed x [T, H, D] as [B, groups, H // groups, L, D]."""
        return self.take(x).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)

    def slots(self, x: Tensor, stride: int) -> Tensor:
        """Compressed slots x [C, Hkv, D] (see CompressedSlots) as [B, Hkv, L // stride, D]."""
        local = torch.arange(self.length // stride, device=x.device)
        slot = ((self.first // stride)[:, None] + local).clamp_(max=x.shape[0] - 1)
        return x.index_select(0, slot.flatten()).unflatten(0, slot.shape).transpose(1, 2)


@dataclass(frozen=True)
class Documents:
    """All documents of a row in few batches. Reads cu_seqlens on the host, which on a GPU waits for the device."""

    batches: tuple[DocumentBatch, ...]
    place: Tensor  # int64 [T], where each packed token stands in the batches' flattened places, laid end to end

    @classmethod
    def of(cls, packing: Packing) -> Documents:
        device = packing.cu_seqlens.device
        ends = packing.cu_seqlens.tolist()
        documents = sorted(((b - a, a) for a, b in zip(ends, ends[1:]) if b > a), key=lambda d: (-d[0], d[1]))
        place = torch.empty(packing.total_tokens, dtype=torch.int64, device=device)
        batches: list[DocumentBatch] = []
        base = i = 0
        while i < len(documents):
            longest = documents[i][0]
            # Padding up to a third more is cheaper than another round of small operations.
            j = i
            while j < len(documents) and 4 * documents[j][0] + 64 >= 3 * longest:
                j += 1
            length, first = torch.tensor(documents[i:j], device=device).unbind(1)
            local = torch.arange(longest, device=device)
            token = (first[:, None] + local).clamp_(max=packing.total_tokens - 1)
            real = local < length[:, None]
            place[token[real]] = base + torch.arange(token.numel(), device=device).view_as(token)[real]
            batches.append(DocumentBatch(token, first))
            base += token.numel()
            i = j
        return cls(tuple(batches), place)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Per-batch results [B, L, ...] back to packed [T, ...]."""
        return torch.cat([p.flatten(0, 1) for p in parts]).index_select(0, self.place)

    def join_heads(self, parts: list[Tensor]) -> Tensor:
        """Per-batch results [B, groups, heads, L, ...] back to packed [T, groups * heads, ...]."""
        return self.join([p.flatten(1, 2).transpose(1, 2) for p in parts])
