"""Texts with marked answers, and how many a model gets right: it sees a text once and must predict the answer's tokens.

An answer counts when every one of its tokens is the likeliest after those before it, which is what greedy generation
would have written. A predictor is anything that gives the next tokens' log-probabilities at marked places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sieve.kernels.nsa.layout import Packing
from sieve.model.decoder import Decoder

# predict(texts, places): for each text (ids) the logits [n, vocab] after its places (indices, ascending).
Predictor = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[Tensor]]


@dataclass(frozen=True)
class Example:
    """tokens: the text, answers included. answers: spans [start, end) of it, each to be predicted from what stands
    before. condition: what it is a case of, such as its length and depth."""

    tokens: list[int]
    answers: tuple[tuple[int, int], ...]
    condition: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cell:
    """Of one condition. correct, count: answers. nats: their cross entropy, over tokens."""

    condition: dict[str, Any]
    correct: int = 0
    count: int = 0
    nats: float = 0.0
    tokens: int = 0

    def row(self) -> dict[str, Any]:
        return self.condition | {
            "accuracy": self.correct / self.count, "loss": self.nats / self.tokens, "answers": self.count,
        }


def score(
    predict: Predictor, examples: Iterable[Example], batch_tokens: int, done: Callable[[int], None] = lambda n: None
) -> list[dict[str, Any]]:
    """A row a condition, in the order they come: the condition, accuracy, loss (nats a token of the answer), answers.

    batch_tokens: of a call of `predict`; a longer text goes alone. done: told the number of examples after each call.
    """
    cells: dict[str, Cell] = {}
    for batch in _batches(examples, batch_tokens):
        places = [[at - 1 for start, end in e.answers for at in range(start, end)] for e in batch]
        for example, logits in zip(batch, predict([e.tokens for e in batch], places)):
            cell = cells.setdefault(repr(example.condition), Cell(example.condition))
            wanted = torch.tensor([t for start, end in example.answers for t in example.tokens[start:end]])
            logits = logits.float().cpu()
            right = logits.argmax(-1) == wanted
            nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            cell.nats += nats.item()
            cell.tokens += wanted.numel()
            cell.count += len(example.answers)
            cell.correct += sum(bool(part.all()) for part in right.split([end - start for start, end in example.answers]))
        done(len(batch))
    return [cell.row() for cell in cells.values()]


def _batches(examples: Iterable[Example], batch_tokens: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    size = 0
    for example in examples:
        if batch and size + len(example.tokens) > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += len(example.tokens)
    if batch:
        yield batch


def packed(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Packing]:
    """tokens int64 [1, T] of the texts laid end to end, and their layout."""
    ends = torch.tensor([0, *map(len, texts)]).cumsum(0)
    tokens = torch.tensor([token for text in texts for token in text], dtype=torch.int64)[None].to(device)
    return tokens, Packing.of(ends.int().to(device), int(ends[-1]), max(map(len, texts)))


def predictor(forward: Callable[[Tensor, Packing, Tensor], Tensor], device: torch.device) -> Predictor:
    """Of forward(tokens [1, T], packing, at [n]) -> logits [n, vocab], such as `forward_of` a decoder."""

    def predict(texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Tensor]:
        tokens, packing = packed(texts, device)
        starts = packing.cu_seqlens.tolist()
        at = torch.tensor([start + place for start, own in zip(starts, places) for place in own], device=device)
        return list(forward(tokens, packing, at).split([len(own) for own in places]))

    return predict


def forward_of(decoder: Decoder) -> Callable[[Tensor, Packing, Tensor], Tensor]:
    """The decoder's logits at places, without gradients."""

    @torch.no_grad()
    def forward(tokens: Tensor, packing: Packing, at: Tensor) -> Tensor:
        return decoder(tokens, None, packing, at=at)

    return forward
