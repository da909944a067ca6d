"""How documents are laid into rows: end to end and cut, or one document a row. (Best fit: sieve.data.best_fit.)

A packer turns a place in a bucket's order into the next row's plan and the place after it, without reading a token.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sieve.data.buckets import Ordered


class Cursor(NamedTuple):
    """The next token to read: `offset` tokens into the document at `position` of `epoch`'s order. Always canonical:
    0 <= offset < that document's length, 0 <= position < number of documents.

    row: best fit alone: how many rows of the window that begins here have been given out.
    """

    epoch: int = 0
    position: int = 0
    offset: int = 0
    row: int = 0


class RowPlan(NamedTuple):
    """pieces: (document, start, stop), tokens start .. stop - 1 of it, in their order in the row; what they leave of the
    row is padding. tokens: their sum. epoch: of the last of them."""

    pieces: list[tuple[int, int, int]]
    tokens: int
    epoch: int


class Packer(Protocol):
    def row(self, cursor: Cursor, seq_len: int) -> tuple[RowPlan, Cursor]:
        """The row of at most `seq_len` tokens at `cursor`, and the cursor after it."""

    def settled(self, cursor: Cursor, seq_len: int) -> Cursor:
        """The first cursor from `cursor` on that every packer understands, at any row length."""


def stepped(bucket: Ordered, epoch: int, position: int) -> tuple[int, int]:
    """The place of the document after the one at (epoch, position)."""
    return (epoch, position + 1) if position + 1 < bucket.num_documents else (epoch + 1, 0)


class Concatenate:
    """Documents end to end, cut where a row ends: no padding, every token once an epoch; an epoch that ends inside a
    row is followed by the next one's documents."""

    def __init__(self, bucket: Ordered):
        self._bucket = bucket

    def row(self, cursor: Cursor, seq_len: int) -> tuple[RowPlan, Cursor]:
        bucket, length_of = self._bucket, self._bucket.tokens.length
        epoch, position, offset, _ = cursor
        pieces, left, last = [], seq_len, epoch
        while left:
            document = bucket.document(epoch, position)
            length = length_of(document)
            stop = min(offset + left, length)
            pieces.append((document, offset, stop))
            left -= stop - offset
            last, offset = epoch, stop
            if stop == length:
                offset = 0
                epoch, position = stepped(bucket, epoch, position)
        return RowPlan(pieces, seq_len, last), Cursor(epoch, position, offset)

    def settled(self, cursor: Cursor, seq_len: int) -> Cursor:
        return cursor


class OneDocument:
    """A row holds a piece of one document: up to `seq_len` tokens from where the row before stopped, then padding."""

    def __init__(self, bucket: Ordered):
        self._bucket = bucket

    def row(self, cursor: Cursor, seq_len: int) -> tuple[RowPlan, Cursor]:
        epoch, position, offset, _ = cursor
        document = self._bucket.document(epoch, position)
        length = self._bucket.tokens.length(document)
        stop = min(offset + seq_len, length)
        plan = RowPlan([(document, offset, stop)], stop - offset, epoch)
        if stop < length:
            return plan, Cursor(epoch, position, stop)
        return plan, Cursor(*stepped(self._bucket, epoch, position))

    def settled(self, cursor: Cursor, seq_len: int) -> Cursor:
        return cursor
