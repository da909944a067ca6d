"""Documents of one source within a range of lengths, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from sieve.data.shuffle import DocumentOrder
from sieve.data.tokens import Tokens, lengths

_BLOCK = 1024  # positions whose documents are worked out at once


class Ordered(Protocol):
    """Documents of `tokens`, which belongs to `source`, in an order of their own in every epoch."""

    source: str
    tokens: Tokens
    num_documents: int

    def document(self, epoch: int, position: int) -> int:
        """The source's index of the document at `position` (0 <= position < num_documents) of `epoch`."""


class AsStored:
    """All documents of `tokens` in the order in which they are stored, in every epoch."""

    def __init__(self, source: str, tokens: Tokens):
        self.source, self.tokens, self.num_documents = source, tokens, tokens.num_documents

    def document(self, epoch: int, position: int) -> int:
        return position


class Bucket:
    """What the stream draws rows from: all documents of a source, or those of low <= length < high tokens.

    name: the source's, with the range where it is a part. num_documents, num_tokens: of the bucket. An epoch of it is
    a permutation of its documents, a pure function of (seed, epoch, num_documents).
    """

    def __init__(
        self, source: str, tokens: Tokens, seed: int, *, low: int = 0, high: int | None = None,
        chosen: np.ndarray | None = None, num_tokens: int | None = None,
    ):
        """chosen: the bucket's documents, ascending, None for all; num_tokens: theirs."""
        self.source, self.tokens, self.seed, self.low = source, tokens, seed, low
        self.name = source if chosen is None else f"{source}[{low}:{'' if high is None else high}]"
        self._chosen = chosen
        self.num_documents = tokens.num_documents if chosen is None else len(chosen)
        self.num_tokens = tokens.num_tokens if num_tokens is None else num_tokens
        self._order = DocumentOrder(self.num_documents, seed)
        self._block: tuple[int, int] = (-1, -1)
        self._documents: list[int] = []

    def document(self, epoch: int, position: int) -> int:
        block = position // _BLOCK
        if self._block != (epoch, block):
            start = block * _BLOCK
            found = self._order.span(epoch, start, min(start + _BLOCK, self.num_documents))
            self._documents = (found if self._chosen is None else self._chosen[found]).tolist()
            self._block = (epoch, block)
        return self._documents[position - block * _BLOCK]


def split(source: str, tokens: Tokens, seed: int, factors: Sequence[Mapping[int, float]]) -> list[Bucket]:
    """The buckets of a source: cut at every length at which one of `factors` (lower bound in tokens -> how many times
    as often, one mapping a phase) changes. Empty buckets are left out; without bounds it is one, of all documents."""
    bounds = sorted({bound for mapping in factors for bound in mapping if bound > 0})
    if not bounds:
        return [Bucket(source, tokens, seed)]
    sizes = lengths(tokens)
    edges = [0, *bounds, None]
    found = []
    for low, high in zip(edges, edges[1:]):
        chosen = np.flatnonzero((sizes >= low) & (sizes < (np.iinfo(np.int64).max if high is None else high)))
        if len(chosen):
            total = int(sizes[chosen].sum())
            found.append(Bucket(source, tokens, seed, low=low, high=high, chosen=chosen, num_tokens=total))
    return found


def factor(mapping: Mapping[int, float], low: int) -> float:
    """What `mapping` says about documents from `low` tokens on: the value of the largest bound <= low, else 1."""
    below = [bound for bound in mapping if bound <= low]
    return mapping[max(below)] if below else 1.0
