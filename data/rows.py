"""A planned row becomes tokens and labels: the only place where the stream reads text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from sieve.data.buckets import Ordered
from sieve.data.packers import RowPlan

IGNORE = -100  # the label of a token that has no next token: cross-entropy's own ignore_index
PAD = 0  # what stands in padding; its label is IGNORE and nothing attends to it from outside
PAD_SEGMENT = 64  # padding is cut into documents of so many tokens: attention inside of them costs next to nothing


class ReadError(RuntimeError):
    """A document could not be read while training; the text names its source and its position."""


def fill(bucket: Ordered, plan: RowPlan, tokens: np.ndarray, labels: np.ndarray | None) -> tuple[list[int], int]:
    """Write the row into `tokens` and `labels` (int64 [seq_len], contiguous; labels may be None: not wanted).

    A label is the next token of the same document, also where the row ends before it; IGNORE at a document's last token
    and in padding. Returns where each piece begins, the first at 0, with the pieces that padding is cut into, and how
    many tokens have a label. Raises ReadError.
    """
    starts, ends, following, filled = [], [], [], 0
    read = bucket.tokens.document
    try:
        for document, start, stop in plan.pieces:
            ids = read(document)
            end = filled + stop - start
            tokens[filled:end] = ids[start:stop]
            starts.append(filled)
            ends.append(end - 1)
            following.append(ids[stop] if stop < len(ids) else IGNORE)
            filled = end
    except Exception as error:
        raise ReadError(
            f"source {bucket.source}, document {document}, tokens {start} to {stop} (epoch {plan.epoch}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if labels is not None:
        labels[:-1] = tokens[1:]
        for end, label in zip(ends, following):
            labels[end] = label
    if filled < len(tokens):
        tokens[filled:] = PAD
        starts.extend(range(filled, len(tokens), PAD_SEGMENT))
        if labels is not None:
            labels[filled:] = IGNORE
    return starts, filled - following.count(IGNORE)


def row_hash(tokens: np.ndarray) -> bytes:
    """XXH3 (128 bits) of a row's tokens, int64 [seq_len], contiguous."""
    return xxhash.xxh3_128_digest(tokens)


def roll(digest: str, rows: Iterable[bytes]) -> str:
    """The hash (hex, 128 bits) after rows, from the one before them ("" before the first) and the rows' own hashes."""
    rolled = bytes.fromhex(digest)
    for row in rows:
        rolled = xxhash.xxh3_128_digest(rolled + row)
    return rolled.hex()


@dataclass(frozen=True)
class Statistics:
    """Of one global step. rows, documents (pieces of documents), positions (tokens and padding), tokens: counts.
    over_8k, over_32k: tokens with more than 8192 and 32768 tokens of their document before them in the row."""

    rows: int
    documents: int
    positions: int
    tokens: int
    over_8k: int
    over_32k: int

    @classmethod
    def of(cls, plans: list[RowPlan], seq_len: int) -> Statistics:
        over = [
            sum(max(0, stop - start - 1 - context) for plan in plans for _, start, stop in plan.pieces)
            if seq_len > context else 0
            for context in (8192, 32768)
        ]
        pieces, tokens = sum([len(plan.pieces) for plan in plans]), sum([plan.tokens for plan in plans])
        return cls(len(plans), pieces, len(plans) * seq_len, tokens, *over)

    def metrics(self) -> dict[str, float]:
        return {
            "data/documents_per_row": self.documents / self.rows,
            "data/padding_share": 1 - self.tokens / self.positions,
            "data/context_over_8k": self.over_8k / self.tokens,
            "data/context_over_32k": self.over_32k / self.tokens,
        }
