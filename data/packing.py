"""Documents laid end to end and cut into rows: no padding, no token lost, no label across documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sieve.data.store import TokenStore

IGNORE = -100  # the label of a token that has no next token: cross-entropy's own ignore_index


@dataclass(frozen=True)
class Cursor:
    """The next token to read: `offset` tokens into the document at `position` of `epoch`'s order. Always canonical:
    0 <= offset < that document's length, 0 <= position < number of documents."""

    epoch: int = 0
    position: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Row:
    """tokens, labels: int64 [seq_len]; starts: where each piece of a document begins, the first at 0; epoch: of the
    last token."""

    tokens: np.ndarray
    labels: np.ndarray
    starts: list[int]
    epoch: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch. tokens, labels: int64 [mb, S]; cu_seqlens: int32 [N + 1] over the mb * S tokens laid end to
    end, a boundary at every document's start and every row's end; max_seqlen: the longest piece.

    A piece that continues a document cut by a row's end is a segment of its own. A label is the next token of the same
    document, which for a row's last token may lie in the next row; IGNORE at a document's last token.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`, copied without waiting where memory is pinned."""
        moved = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.cu_seqlens))
        return Batch(*moved, self.max_seqlen)


def read_row(
    store: TokenStore, order: Callable[[int, int], int], cursor: Cursor, seq_len: int
) -> tuple[Row, Cursor]:
    """The `seq_len` tokens from `cursor` on, and the cursor after them.

    order(epoch, position) names the document. An epoch that ends inside the row is followed by the next one's
    documents, so that every token is an input exactly once an epoch.
    """
    tokens = np.empty(seq_len, np.int64)
    labels = np.empty(seq_len, np.int64)
    starts, filled = [], 0
    epoch, position, offset = cursor.epoch, cursor.position, cursor.offset
    while filled < seq_len:
        document = store.document(order(epoch, position))
        taken = min(seq_len - filled, len(document) - offset)
        end = offset + taken
        following = document[offset + 1 : end + 1]
        tokens[filled : filled + taken] = document[offset:end]
        labels[filled : filled + len(following)] = following
        labels[filled + len(following) : filled + taken] = IGNORE
        starts.append(filled)
        filled += taken
        last_epoch, offset = epoch, end
        if offset == len(document):
            position, offset = position + 1, 0
        if position == store.num_documents:
            epoch, position = epoch + 1, 0
    return Row(tokens, labels, starts, last_epoch), Cursor(epoch, position, offset)


def stack(rows: Sequence[Row]) -> Batch:
    """The rows of one micro-batch, all of one length, as tensors."""
    seq_len = len(rows[0].tokens)
    edges = [i * seq_len + start for i, row in enumerate(rows) for start in row.starts] + [len(rows) * seq_len]
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in rows])),
        torch.from_numpy(np.stack([row.labels for row in rows])),
        torch.tensor(edges, dtype=torch.int32),
        max(right - left for left, right in zip(edges, edges[1:])),
    )
