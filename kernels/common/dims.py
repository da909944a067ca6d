"""Head dimensions as sums of at most two powers of two, so that 192 costs 128 + 64 and not 256.

A Triton tile needs power-of-two sides. A kernel takes D0 and D1 as constexprs, keeps two tiles [rows, D0] and
[rows, D1] beside each other where D1 > 0, and skips the second at compile time where D1 = 0:

    s = tl.dot(q0, tl.trans(k0))
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s)
"""

from __future__ import annotations

import functools

# Below 16 elements tl.dot has no tile; above 256 an accumulator of 64 rows no longer fits into registers.
SMALLEST, LARGEST = 16, 256


@functools.cache  # every launch asks
def split_dim(d: int) -> tuple[int, int]:
    """(d0, d1) with d = d0 + d1, both powers of two of at least 16, d1 < d0, or d1 = 0 if d is a power of two.

    Raises ValueError for other dimensions: not a multiple of 16, above 256, or needing three powers of two (112).
    """
    allowed = supported_dims()
    if d not in allowed:
        raise ValueError(
            f"head dimension {d} has no Triton kernel; choose one of {', '.join(map(str, allowed))}, "
            'or use impl="reference"'
        )
    d0 = 1 << (d.bit_length() - 1)
    return d0, d - d0


def supported_dims() -> tuple[int, ...]:
    """The head dimensions that `split_dim` takes, ascending: 16, 32, 48, 64, 80, 96, 128, ... 256."""
    return tuple(d for d in range(SMALLEST, LARGEST + 1, 16) if d.bit_count() <= 2)
