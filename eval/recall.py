"""Synthetic recall of random tokens: what attention must do before it can do anything with language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sieve.eval.config import RecallConfig
from sieve.eval.examples import Example


def check_pairs(config: RecallConfig, alphabet: Sequence[int]) -> None:
    """ValueError when there are fewer keys in the alphabet than pairs."""
    for pairs in config.pairs:
        if pairs > (keys := len(alphabet) // 2):
            raise ValueError(f"recall.pairs={pairs} is more than the {keys} tokens that may be keys; give fewer")


def mqar(config: RecallConfig, alphabet: Sequence[int], bos: Sequence[int], seed: int) -> Iterator[Example]:
    """Multi-query associative recall (arXiv 2312.04927): k1 v1 k2 v2 ..., then every key once more, shuffled, each
    followed by its value. Keys are distinct, from one half of the alphabet; values from the other, so that
    chance among values is 1 / (half of it). ValueError when there are fewer keys in it than pairs."""
    keys, values = alphabet[: len(alphabet) // 2], alphabet[len(alphabet) // 2 :]
    check_pairs(config, alphabet)
    for pairs in config.pairs:
        for sample in range(config.samples):
            rng = np.random.default_rng((seed, 1, pairs, sample))
            key, value = rng.choice(keys, pairs, replace=False), rng.choice(values, pairs)
            order = rng.permutation(pairs)
            tokens = [*bos, *np.stack([key, value], 1).flatten().tolist()]
            start = len(tokens)
            tokens += np.stack([key[order], value[order]], 1).flatten().tolist()
            answers = tuple((start + 2 * i + 1, start + 2 * i + 2) for i in range(pairs))
            yield Example(tokens, answers, {"pairs": pairs})


def copy(config: RecallConfig, alphabet: Sequence[int], bos: Sequence[int], seed: int) -> Iterator[Example]:
    """A separator, random tokens, the separator, the same tokens again, each of which is an answer of its own. Tokens
    and pairs repeat by accident, so that looking back for the last token is not enough."""
    separator, letters = alphabet[0], alphabet[1:]
    for length in config.lengths:
        for sample in range(config.samples):
            rng = np.random.default_rng((seed, 2, length, sample))
            text = rng.choice(letters, length).tolist()
            tokens = [*bos, separator, *text, separator, *text]
            start = len(tokens) - length
            yield Example(tokens, tuple((at, at + 1) for at in range(start, len(tokens))), {"length": length})


def induction(config: RecallConfig, alphabet: Sequence[int], bos: Sequence[int], seed: int) -> Iterator[Example]:
    """Random tokens with one pair "a b" at a random place, a nowhere else; at the end a again: what follows?"""
    trigger, letters = alphabet[0], alphabet[1:]
    for length in config.lengths:
        for sample in range(config.samples):
            rng = np.random.default_rng((seed, 3, length, sample))
            text = rng.choice(letters, length).tolist()
            at = int(rng.integers(0, length - 1))
            text[at] = trigger
            tokens = [*bos, *text, trigger, text[at + 1]]
            yield Example(tokens, ((len(tokens) - 1, len(tokens)),), {"length": length})


GENERATORS = {"mqar": mqar, "copy": copy, "induction": induction}


def chance(task: str, alphabet: Sequence[int]) -> float:
    """Accuracy of a guess among the tokens that can be an answer."""
    half = len(alphabet) - len(alphabet) // 2
    return 1 / (half if task == "mqar" else len(alphabet) - 1)
