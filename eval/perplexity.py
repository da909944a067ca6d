"""The loss on held-out text, by how much context a token has: at position 1, 2 to 3, 4 to 7, 8 to 15, ...

The same sums serve any other count from 1 that is grouped by powers of two, such as the length of the document.
"""

from __future__ import annotations

import math

import sentencepiece
import torch
from torch import Tensor

from sieve.data.hub_tokenizer import hub_token_bytes, is_hub_model

IGNORE = -100


class PositionLoss:
    """Sums of cross entropy, over all labelled tokens and by powers of two of the position in the document.

    A position counts the tokens that the model may look at, from 1: a document's first token has position 1, and so
    has the first token of a row, since attention ends there. `sums` is what ranks have to add up, float64
    [3, buckets]: loss in nats, labelled tokens, and UTF-8 bytes of the labels.
    """

    def __init__(self, seq_len: int, bytes_of: Tensor, name: str = "pos") -> None:
        """seq_len: the largest count. bytes_of: int64 [vocab], of `token_bytes`, on the device of the batches. name: what
        is counted, for the metrics' names."""
        self.bytes_of, self.name = bytes_of, name
        self.sums = torch.zeros(3, seq_len.bit_length(), dtype=torch.float64, device=bytes_of.device)

    def add(self, token_loss: Tensor, labels: Tensor, position: Tensor) -> None:
        """token_loss fp32 [B, S] in nats, labels int64 [B, S] (-100 = none), position int [B * S] from 0."""
        labels = labels.flatten()
        labelled = labels != IGNORE
        bucket = torch.frexp((position + 1).float()).exponent.long() - 1  # exact, as log2 is not
        rows = (token_loss.flatten() * labelled, labelled, self.bytes_of[labels.clamp(min=0)] * labelled)
        for total, values in zip(self.sums, rows):
            # Ordered sums, so that an evaluation gives the same bits again, which atomics would not.
            total += torch.stack([(values.double() * (bucket == i)).sum() for i in range(total.numel())])

    def metrics(self) -> dict[str, float]:
        """eval/loss in nats a token, eval/bits_per_byte, and eval/loss_pos_0001, 0002, 0004, ... named by each
        bucket's first position."""
        loss, count, size = self.sums.tolist()
        found = {"eval/loss": sum(loss) / sum(count), "eval/bits_per_byte": sum(loss) / math.log(2) / sum(size)}
        by_position = {
            f"eval/loss_{self.name}_{2**i:04d}": nats / tokens for i, (nats, tokens) in enumerate(zip(loss, count)) if tokens
        }
        return found | by_position

    def mean(self) -> float:
        """Nats a token."""
        return (self.sums[0].sum() / self.sums[1].sum()).item()

    def rows(self) -> list[dict[str, float | int | None]]:
        """Bucket by bucket that has tokens: `from` and `to` (inclusive), tokens, loss in nats, bits_per_byte."""
        return [
            {
                "from": 2**i, "to": 2 ** (i + 1) - 1, "tokens": int(tokens), "loss": nats / tokens,
                "bits_per_byte": nats / math.log(2) / size if size else None,
            }
            for i, (nats, tokens, size) in enumerate(self.sums.T.tolist()) if tokens
        ]


def token_bytes(model: bytes) -> Tensor:
    """int64 [vocab]: how many UTF-8 bytes of text each token of an Encoder's serialized `model` stands for."""
    if is_hub_model(model):
        return torch.tensor(hub_token_bytes(model))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return torch.tensor([_length(processor, i) for i in range(processor.vocab_size())])


def _length(processor: sentencepiece.SentencePieceProcessor, token: int) -> int:
    if processor.is_control(token) or processor.is_unknown(token):
        return 0
    if processor.is_byte(token):
        return 1
    return len(processor.id_to_piece(token).replace("\u2581", " ").encode())
