"""Where the documents of a packed row lie: computed on the device from cu_seqlens, without reading them on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """T tokens of N documents laid end to end.

    cu_seqlens: int32 [N + 1], first 0, last T, never falling; equal neighbours are empty documents, so that a caller
        may pad it with T to a fixed length.
    doc: int32 [T], each token's document. position: int32 [T], its place in that document, from 0.
    max_seqlen: an upper bound of the documents' lengths, known on the host.
    even: whether all documents are known to be of max_seqlen tokens.
    """

    cu_seqlens: Tensor
    doc: Tensor
    position: Tensor
    max_seqlen: int
    even: bool = False

    @classmethod
    def of(cls, cu_seqlens: Tensor, total_tokens: int, max_seqlen: int) -> Packing:
        """Lay out `total_tokens` tokens by `cu_seqlens` (int32 [N + 1], on the device the attention runs on)."""
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens must be int32 [N + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
        token = torch.arange(total_tokens, dtype=torch.int32, device=cu_seqlens.device)
        doc = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
        even = (cu_seqlens.numel() - 1) * max_seqlen == total_tokens  # none is longer, so none can be shorter
        return cls(cu_seqlens, doc, token - cu_seqlens[doc], max_seqlen, even)

    @property
    def total_tokens(self) -> int:
        return self.doc.numel()

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens.numel() - 1


@dataclass(frozen=True)
class CompressedSlots:
    """Where compressed blocks are stored: C = T // d slots, document b's from slot cu_seqlens[b] // d on.

    A document of L tokens has at most L // d blocks, so slots of different documents never collide and the count of
    slots needs no look at cu_seqlens' values. Slots past a document's last block are unused: never visible.

    start: int32 [C], the packed index of the first token of the slot's stride-d chunk (clamped into the row).
    position: int32 [C], that token's position in its document: i * d for local block i.
    valid: bool [C], whether all kernel_size tokens lie in the document.
    chunk: bool [C], whether the slot's own kernel_stride tokens lie in the document.
    any_filling: slots that hold no block may hold anything finite, since nobody reads them.
    """

    start: Tensor
    position: Tensor
    valid: Tensor
    chunk: Tensor
    any_filling: bool = False

    @classmethod
    def of(cls, packing: Packing, kernel_size: int, kernel_stride: int) -> CompressedSlots:
        cu, d = packing.cu_seqlens, kernel_stride
        slot = torch.arange(packing.total_tokens // d, dtype=torch.int32, device=cu.device)
        first = cu // d
        # Documents that share a first slot have no blocks but the last of them: right=True finds that one.
        doc = (torch.searchsorted(first, slot, right=True, out_int32=True) - 1).clamp_(max=packing.num_documents - 1)
        position = (slot - first[doc]) * d
        length = cu[doc + 1] - cu[doc]
        start = (cu[doc] + position).clamp_(max=max(packing.total_tokens - 1, 0))
        return cls(start, position, position + kernel_size <= length, position + d <= length)
