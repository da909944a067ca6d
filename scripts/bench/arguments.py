"""Numbers as the benchmarks take them on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(lowest: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """An argparse type: a number that is `lowest` or more."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= lowest:  # NaN is not, either
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * (kind is int)}number of at least {lowest}")
        return value

    return number
