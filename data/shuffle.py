"""The order of documents in an epoch: a pure function of three integers, so that no state of it need be saved."""

from __future__ import annotations

import hashlib
import math

import numpy as np

_ROUNDS = 6


class DocumentOrder:
    """A pseudo-random permutation of range(n) for every (seed, epoch), evaluated at any place in O(1) time and memory.

    A Feistel network over Z_a x Z_b with a * b just above n, walked along its cycle until it lands below n
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002); the round function is the finalizer of
    splitmix64 (Steele, Lea and Flood, OOPSLA 2014). a * b exceeds n by less than a, so that walks are rare.
    """

    def __init__(self, n: int, seed: int):
        """n: number of documents; seed: any integer. Raises ValueError if n < 1."""
        if n < 1:
            raise ValueError(f"an order of n={n} documents; there must be at least one")
        self.n, self.seed = n, seed
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._epoch, self._keys = -1, np.zeros(0, np.uint64)

    def at(self, epoch: int, position: int) -> int:
        """The document at `position` (0 <= position < n) of `epoch` (from 0). Raises IndexError outside."""
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} is outside of {self.n} documents")
        return int(self.span(epoch, position, position + 1)[0])

    def span(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start], the documents at positions start .. stop - 1 of `epoch`, 0 <= start <= stop <= n."""
        if epoch != self._epoch:
            self._epoch, self._keys = epoch, self._round_keys(epoch)
        index = self._permute(np.arange(start, stop, dtype=np.uint64))
        while len(walking := np.flatnonzero(index >= self.n)):
            index[walking] = self._permute(index[walking])
        return index.astype(np.int64)

    def _round_keys(self, epoch: int) -> np.ndarray:
        digest = hashlib.blake2b(f"{self.seed}/{epoch}/{self.n}".encode(), digest_size=8 * _ROUNDS).digest()
        return np.frombuffer(digest, "<u8")

    def _permute(self, index: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = index // b, index % b
        for i, key in enumerate(self._keys):
            if i % 2:
                right = _sum_below(right, _mix(key, left), b)
            else:
                left = _sum_below(left, _mix(key, right), a)
        return left * b + right


def _sum_below(x: np.ndarray, y: np.ndarray, modulus: np.uint64) -> np.ndarray:
    """(x + y) % modulus without overflow, for x < modulus."""
    return (x + y % modulus) % modulus


def _mix(key: np.uint64, value: np.ndarray) -> np.ndarray:
    z = key + value * np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap around, which is what is wanted
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
