"""A number hidden in much text: one, one of several, or the passkey of arXiv 2305.16300. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sieve.eval.config import NeedleConfig
from sieve.eval.examples import Example

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi", "Dublin",
    "Lisbon", "Athens", "Prague", "Warsaw", "Helsinki", "Bern", "Riga", "Sofia", "Kyiv", "Ankara", "Nairobi", "Quito",
)


def lead(kind: str, name: str) -> str:
    """The words before a fact's number, in the text as in the question."""
    return "\nThe pass key is" if kind == "passkey" else f"\nThe magic number of {name} is"


def haystack(encode: Callable[[str], list[int]], tokens: Sequence[int] | None = None) -> Callable[[int, int], list[int]]:
    """fill(start, count): `count` tokens of filler from place `start` on, which begins again at its end. tokens: real
    text to take instead of the passkey paper's sentences."""
    source = list(tokens) if tokens is not None and len(tokens) else encode(FILLER)

    def fill(start: int, count: int) -> list[int]:
        shift = start % len(source)
        return ((source[shift:] + source[:shift]) * (count // len(source) + 1))[:count]

    return fill


def needle(
    config: NeedleConfig, encode: Callable[[str], list[int]], bos: Sequence[int], seed: int, *,
    kind: str = "needle", fill: Callable[[int, int], list[int]] | None = None,
) -> Iterator[Example]:
    """Texts of exactly each length, in tokens, with the fact at each depth. kind: needle, multikey or passkey.

    The fact's own words lead to its number at the end of the text once more. ValueError, with the least length, when a
    text is too short for them.
    """
    fill = fill or haystack(encode)
    for length in config.lengths:
        for depth in config.depths:
            for sample in range(config.samples):
                rng = _draws(seed, kind, length, sample)
                yield _example(config, encode, list(bos), rng, kind, length, depth, fill)


def check_lengths(
    config: NeedleConfig, encode: Callable[[str], list[int]], bos: Sequence[int], seed: int, kind: str
) -> None:
    """ValueError, with the least length, when a text that `needle` would make is too short; no text is made."""
    for length in config.lengths:
        needed = 0
        for sample in range(config.samples):
            leads, facts, answer = _told(config, encode, _draws(seed, kind, length, sample), kind)
            needed = max(needed, _needed(bos, leads, facts, answer))
        if needed > length:
            raise ValueError(_too_short(kind, length, needed))


def _draws(seed: int, kind: str, length: int, sample: int) -> np.random.Generator:
    return np.random.default_rng((seed, {"needle": 4, "multikey": 5, "passkey": 6}[kind], length, sample))


def _needed(bos: Sequence[int], leads: list[list[int]], facts: list[list[int]], answer: list[int]) -> int:
    """Tokens of a text without any filler."""
    return len(bos) + sum(map(len, facts)) + len(leads[0]) + len(answer)


def _too_short(kind: str, length: int, needed: int) -> str:
    return f"needle.lengths={length} is too short; {kind} needs at least {needed} tokens"


def _told(
    config: NeedleConfig, encode: Callable[[str], list[int]], rng: np.random.Generator, kind: str
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """What leads to each number, the facts, and the number that is asked for, the first fact's: all in tokens."""
    count = config.keys if kind == "multikey" else 1
    if count > len(CITIES):
        raise ValueError(f"needle.keys={count}: there are names for {len(CITIES)} keys")
    names = rng.choice(CITIES, count, replace=False)
    # Words and number are encoded apart, so that the number is the same tokens in the fact and in the answer.
    leads = [encode(lead(kind, name)) for name in names]
    numbers = [encode(f" {rng.integers(10 ** (config.digits - 1), 10**config.digits)}") for _ in names]
    facts = [lead + number + encode(".\n") for lead, number in zip(leads, numbers)]
    return leads, facts, numbers[0]


def _example(
    config: NeedleConfig, encode: Callable[[str], list[int]], bos: list[int], rng: np.random.Generator, kind: str,
    length: int, depth: float, fill: Callable[[int, int], list[int]],
) -> Example:
    leads, facts, answer = _told(config, encode, rng, kind)
    room = length - (needed := _needed(bos, leads, facts, answer))
    if room < 0:
        raise ValueError(_too_short(kind, length, needed))
    places = [round(depth * room), *sorted(int(rng.integers(0, room + 1)) for _ in facts[1:])]
    filler = fill(int(rng.integers(0, 1 << 20)), room)
    tokens, used = list(bos), 0
    for place, fact in sorted(zip(places, facts), key=lambda pair: pair[0]):
        tokens += filler[used:place] + fact
        used = place
    tokens += filler[used:] + leads[0] + answer
    return Example(tokens, ((length - len(answer), length),), {"length": length, "depth": depth})
