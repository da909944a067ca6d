"""What a stream reads from: documents of token ids with an index, wherever and in however many files they lie."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Tokens(Protocol):
    """A read-only collection of tokenized documents, as sieve.data.store.TokenStore is one.

    num_documents, num_tokens: counts. id: equal for equal tokens in equal order.
    """

    num_documents: int
    num_tokens: int
    id: str

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index`, bos and eos included: [length], unsigned integers; in O(1) time."""

    def length(self, index: int) -> int:
        """Tokens of document `index`, in O(1) time."""


def lengths(tokens: Tokens) -> np.ndarray:
    """int64 [num_documents], every document's length."""
    return np.fromiter(map(tokens.length, range(tokens.num_documents)), np.int64, tokens.num_documents)
