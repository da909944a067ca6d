"""Best-fit packing: no document that fits a row is cut, and little of a row is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from sieve.data.buckets import Bucket
from sieve.data.packers import Cursor, RowPlan, stepped
from sieve.data.shuffle import DocumentOrder

WINDOW_ROWS = 256  # rows' worth of tokens that are packed together


class BestFit:
    """Packs windows of consecutive documents by best fit decreasing (arXiv 2404.10830, there over a whole data set).

    A document longer than a row is cut into full rows and a rest, which is packed like a short document. Windows end
    with their epoch. The rows of a window come in a pseudo-random order, since packing sorts them by length.
    """

    def __init__(self, bucket: Bucket):
        self._bucket = bucket
        self._key: tuple[Cursor, int] | None = None
        self._rows: list[RowPlan] = []
        self._after = Cursor()

    def row(self, cursor: Cursor, seq_len: int) -> tuple[RowPlan, Cursor]:
        self._pack(cursor._replace(row=0), seq_len)
        following = cursor.row + 1
        return self._rows[cursor.row], cursor._replace(row=following) if following < len(self._rows) else self._after

    def settled(self, cursor: Cursor, seq_len: int) -> Cursor:
        """After the window that `cursor` stands in, whose other rows no other packing could tell from those given."""
        if cursor.row == 0:
            return cursor
        self._pack(cursor._replace(row=0), seq_len)
        return self._after

    def _pack(self, start: Cursor, seq_len: int) -> None:
        """Plan the window at `start`, unless it is the one planned last: a pure function, so it is no state."""
        if self._key == (start, seq_len):
            return
        bucket, length_of = self._bucket, self._bucket.tokens.length
        full: list[tuple[int, int, int]] = []
        parts: list[tuple[int, int, int]] = []
        epoch, position, offset, _ = start
        taken = 0
        while epoch == start.epoch and taken < WINDOW_ROWS * seq_len:
            document = bucket.document(epoch, position)
            length = length_of(document)
            taken += length - offset
            while length - offset >= seq_len:
                full.append((document, offset, offset + seq_len))
                offset += seq_len
            if offset < length:
                parts.append((document, offset, length))
            offset = 0
            epoch, position = stepped(bucket, epoch, position)
        rows = [[piece] for piece in full] + best_fit(parts, seq_len)
        plans = [RowPlan(pieces, sum(stop - begin for _, begin, stop in pieces), start.epoch) for pieces in rows]
        order = DocumentOrder(len(plans), (self._bucket.seed << 64) + start.position).span(start.epoch, 0, len(plans))
        self._rows = [plans[i] for i in order.tolist()]
        self._key, self._after = (start, seq_len), Cursor(epoch, position)


def best_fit(parts: Sequence[tuple[int, int, int]], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (document, start, stop), each of at most seq_len tokens: by falling length, each part goes where it
    leaves the least room, else into a new row. Parts of a row stand in the order of `parts`."""
    ranked = sorted(range(len(parts)), key=lambda i: parts[i][1] - parts[i][2])  # stable: equal lengths keep their order
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in ranked:
        size = parts[i][2] - parts[i][1]
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > size:
            insort(rooms, (room - size, row))
    return [[parts[i] for i in sorted(row)] for row in rows]
