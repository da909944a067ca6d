"""The order of documents in an epoch: a pure function of three integers, so that no state of it need be saved."""

from __future__ import annotations

import hashlib
import math

_MASK = (1 << 64) - 1
_ROUNDS = 6


class DocumentOrder:
    """A pseudo-random permutation of range(n) for every (seed, epoch), evaluated at one index in O(1) time and memory.

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
        self._epoch, self._keys = -1, ()

    def at(self, epoch: int, position: int) -> int:
        """The document at `position` (0 <= position < n) of `epoch` (from 0). Raises IndexError outside."""
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} is outside of {self.n} documents")
        if epoch != self._epoch:
            self._epoch, self._keys = epoch, self._round_keys(epoch)
        index = self._permute(position)
        while index >= self.n:
            index = self._permute(index)
        return index

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        digest = hashlib.blake2b(f"{self.seed}/{epoch}/{self.n}".encode(), digest_size=8 * _ROUNDS).digest()
        return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))

    def _permute(self, index: int) -> int:
        left, right = divmod(index, self._b)
        for i, key in enumerate(self._keys):
            if i % 2:
                right = (right + _mix(key, left)) % self._b
            else:
                left = (left + _mix(key, right)) % self._a
        return left * self._b + right


def _mix(key: int, value: int) -> int:
    z = (key + value * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
