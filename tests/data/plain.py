"""The stream of rows written down slowly: tokens one by one, lists, fractions. What the real one is compared with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from sieve.data.shuffle import DocumentOrder

IGNORE, PAD = -100, 0


class ListTokens:
    """Documents in memory. Token 1000 * d + i + 1 is the i-th of document d of the source `number`, in its own million,
    so that a token tells where it is from."""

    def __init__(self, sizes: list[int], number: int = 0):
        base = 1_000_000 * number
        self.documents = [[base + 1000 * (d % 1000) + i % 1000 + 1 for i in range(size)] for d, size in enumerate(sizes)]
        self.arrays = [np.array(ids, np.uint32) for ids in self.documents]
        self.num_documents, self.num_tokens = len(sizes), sum(sizes)
        self.id = f"{number}:{sizes}"
        self.reads = 0

    def document(self, index: int) -> np.ndarray:
        self.reads += 1
        return self.arrays[index]

    def length(self, index: int) -> int:
        return len(self.arrays[index])


class PlainBucket:
    def __init__(self, documents, seed, low):
        self.documents, self.seed, self.low = documents, seed, low
        self.epoch = self.position = self.offset = 0
        self.planned: list[list[tuple[int, int]]] = []  # rows of (token, label) that best fit has yet to give out
        self.given = 0

    def current(self):
        at = DocumentOrder(len(self.documents), self.seed).at(self.epoch, self.position)
        return self.documents[at]

    def labelled(self, document, start, stop):
        return [(document[i], document[i + 1] if i + 1 < len(document) else IGNORE) for i in range(start, stop)]

    def step(self):
        """To the next token."""
        self.offset += 1
        if self.offset == len(self.current()):
            self.offset, self.position = 0, self.position + 1
            if self.position == len(self.documents):
                self.epoch, self.position = self.epoch + 1, 0

    def row(self, packing, size, window):
        if packing == "best_fit":
            if not self.planned:
                self.plan(size, window)
            return self.planned.pop(0)
        row = []
        while len(row) < size:
            before = (self.epoch, self.position)
            row += self.labelled(self.current(), self.offset, self.offset + 1)
            self.step()
            if packing == "document" and (self.epoch, self.position) != before:
                break
        return row

    def plan(self, size, window):
        epoch, first, taken, full, parts = self.epoch, self.position, 0, [], []
        while self.epoch == epoch and taken < window * size:
            document, start = self.current(), self.offset
            pieces = [(i, min(i + size, len(document))) for i in range(start, len(document), size)]
            for piece in pieces:
                (full if piece[1] - piece[0] == size else parts).append((document, *piece))
            taken += len(document) - start
            for _ in range(start, len(document)):
                self.step()
        rows = [[i] for i in range(len(full))]
        pieces = full + parts
        packed: list[list[int]] = []
        for i in sorted(range(len(full), len(pieces)), key=lambda i: -(pieces[i][2] - pieces[i][1])):
            need = pieces[i][2] - pieces[i][1]
            rooms = [size - sum(pieces[j][2] - pieces[j][1] for j in row) for row in packed]
            fitting = [(room, r) for r, room in enumerate(rooms) if room >= need]
            if fitting:
                packed[min(fitting)[1]].append(i)
            else:
                packed.append([i])
        rows += [sorted(row) for row in packed]
        order = DocumentOrder(len(rows), (self.seed << 64) + first)
        for n in range(len(rows)):
            row = rows[order.at(epoch, n)]
            self.planned.append([pair for i in row for pair in self.labelled(*pieces[i])])


def factor_of(factors, low):
    found = 1.0
    for bound, value in sorted(factors.items()):
        found = value if bound <= low else found
    return found


def plain_stream(sources, phases, seed, steps, window):
    """(source, tokens, labels) of every row of `steps` steps, in global order. sources: {name: documents}."""
    buckets = []
    for name, documents in sources.items():
        bounds = sorted({b for phase in phases for b in phase.upsample.get(name, {}) if b > 0})
        for low, high in zip([0, *bounds], [*bounds, 10**9]):
            own = [ids for ids in documents if low <= len(ids) < high]
            if own:
                buckets.append((name, PlainBucket(own, seed, low)))
    tokens, phase, rows = 0, None, []
    for _ in range(steps):
        following = [p for p in phases if p.from_tokens <= tokens][-1]
        if phase is not following:
            for _, bucket in buckets:
                bucket.given = 0
                if phase is not None and (phase.packing, phase.seq_len) != (following.packing, following.seq_len):
                    bucket.planned = []
            phase = following
        amounts = []
        for name, bucket in buckets:
            everything = [b for n, b in buckets if n == name]
            mass = [sum(map(len, b.documents)) * Fraction(str(factor_of(phase.upsample.get(name, {}), b.low)))
                    for b in everything]
            amounts.append(Fraction(str(phase.weights[name])) * mass[everything.index(bucket)] / sum(mass))
        shares = [amount / sum(amounts) for amount in amounts]
        for _ in range(phase.global_batch):
            after = sum(bucket.given for _, bucket in buckets) + phase.seq_len
            late = [i for i, (_, b) in enumerate(buckets) if b.given < shares[i] * after]
            i = min(late, key=lambda i: (buckets[i][1].given + phase.seq_len) / shares[i])
            name, bucket = buckets[i]
            row = bucket.row(phase.packing, phase.seq_len, window)
            bucket.given += len(row)
            row = row + [(PAD, IGNORE)] * (phase.seq_len - len(row))
            rows.append((name, [t for t, _ in row], [label for _, label in row]))
        tokens += phase.global_batch * phase.seq_len
    return rows
