"""Rows as a micro-batch of tensors, with the boundaries that keep attention inside documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. tokens, labels: int64 [mb, S]; cu_seqlens: int32 [N + 1] over the mb * S tokens laid end to
    end, a boundary at every document's start and every row's end; max_seqlen: the longest piece.

    A piece that continues a document cut by a row's end is a segment of its own. A label is the next token of the same
    document, which for a row's last token may lie in the next row; IGNORE at a document's last token.
    padding: bool [mb, S], or None where no row has any; padding has no labels and lies in short segments of its own.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    padding: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`, copied without waiting where memory is pinned."""
        moved = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.cu_seqlens))
        padding = None if self.padding is None else self.padding.to(device, non_blocking=True)
        return Batch(*moved, self.max_seqlen, padding)


def beginnings(batches: Sequence[Batch]) -> Batch:
    """The first tokens of every row of `batches` (alike in shape, in host memory), in all as many as one batch has, or the
    fewest more that give every row as many: a batch of rows of S / len(batches) tokens, with the boundaries that fall into
    them. In pinned memory if they are.
    """
    rows, length = batches[0].tokens.shape
    kept = -(-length // len(batches))
    starts: list[list[int]] = []
    for batch in batches:
        row, place = np.divmod(batch.cu_seqlens.numpy()[:-1], length)
        starts += [place[(row == i) & (place < kept)].tolist() for i in range(rows)]
    flat, longest = edges(starts, kept)

    def joined(parts: Iterable[Tensor]) -> Tensor:
        out = torch.cat([part[:, :kept] for part in parts])
        return out.pin_memory() if batches[0].tokens.is_pinned() else out

    cu_seqlens = torch.from_numpy(flat)
    masks = [torch.zeros_like(b.tokens, dtype=torch.bool) if b.padding is None else b.padding for b in batches]
    return Batch(
        joined(b.tokens for b in batches), joined(b.labels for b in batches),
        cu_seqlens.pin_memory() if batches[0].cu_seqlens.is_pinned() else cu_seqlens, longest,
        joined(masks) if any(b.padding is not None for b in batches) else None,
    )


def edges(starts: Sequence[Sequence[int]], seq_len: int) -> tuple[np.ndarray, int]:
    """cu_seqlens, int32 [N + 1], and max_seqlen of rows of `seq_len` tokens laid end to end, whose pieces begin at
    `starts`."""
    flat = [i * seq_len + start for i, row in enumerate(starts) for start in row]
    flat.append(len(starts) * seq_len)
    return np.array(flat, np.int32), max([b - a for a, b in zip(flat, flat[1:])])
