"""The loss on whole documents, by position in them and by their length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sieve.data.config import DataConfig
from sieve.data.sources import source_of
from sieve.data.tokens import Tokens
from sieve.eval.examples import packed
from sieve.eval.load import Text
from sieve.eval.perplexity import PositionLoss
from sieve.kernels.nsa.layout import Packing
from sieve.model.decoder import Decoder

IGNORE = -100
# token_loss(tokens [1, T], labels [1, T], packing) -> fp32 [1, T], nats of each token, 0 where unlabelled
TokenLoss = Callable[[Tensor, Tensor, Packing], Tensor]
# documents(max_tokens) -> arrays of ids with bos and eos, the last one cut so that all have max_tokens (None: no limit)
Documents = Callable[[int | None], Iterable[np.ndarray]]


def stored_documents(store: Tokens, max_tokens: int | None) -> Iterator[np.ndarray]:
    """Documents of a store, bos and eos included, the last one cut so that all have max_tokens together."""
    return _limited((store.document(i) for i in range(store.num_documents)), max_tokens)


def read_documents(paths: Sequence[str], text: Text, max_tokens: int | None) -> Iterator[np.ndarray]:
    """Documents of files (text, JSON lines, parquet), tokenised, with bos and eos; cut as stored_documents' are.

    ValueError, naming loss.source, for paths that hold no text.
    """
    source = source_of(DataConfig(type="files", paths=tuple(paths)), named="loss.source")
    ends = ([] if text.bos_id is None else [text.bos_id]), ([] if text.eos_id is None else [text.eos_id])
    return _limited(
        (np.asarray([*ends[0], *text.encode(document.text), *ends[1]]) for document in source), max_tokens
    )


def _limited(documents: Iterable[np.ndarray], max_tokens: int | None) -> Iterator[np.ndarray]:
    left = max_tokens
    for document in documents:
        if left is not None:
            document = document[:left]
            left -= len(document)
        if len(document) > 1:
            yield document
        if left is not None and left < 2:
            return


def token_loss_of(decoder: Decoder) -> TokenLoss:
    """The decoder's, without gradients."""

    @torch.no_grad()
    def token_loss(tokens: Tensor, labels: Tensor, packing: Packing) -> Tensor:
        return decoder(tokens, labels, packing, per_token=True).token_loss

    return token_loss


def document_loss(
    token_loss: TokenLoss, documents: Iterable[np.ndarray], bytes_of: Tensor, seq_len: int, batch_tokens: int,
    done: Callable[[int], None] = lambda n: None,
) -> tuple[PositionLoss, PositionLoss]:
    """Sums by position and by the document's length, in powers of two.

    A document longer than seq_len is read in pieces that long, each of which begins anew at position 1; its length is
    the whole document's. bytes_of: int64 [vocab], on the device to compute on. done: told of tokens after each forward.
    """
    by_position = PositionLoss(seq_len, bytes_of)
    by_length = PositionLoss(1 << 40, bytes_of, "len")
    batch: list[tuple[np.ndarray, np.ndarray, int]] = []
    size = 0

    def flush() -> None:
        tokens, packing = packed([piece.tolist() for piece, _, _ in batch], bytes_of.device)
        labels = torch.from_numpy(np.concatenate([label for _, label, _ in batch]))[None].to(bytes_of.device)
        length = torch.tensor([length for _, _, length in batch], device=bytes_of.device)[packing.doc.long()]
        loss = token_loss(tokens, labels, packing)
        by_position.add(loss, labels, packing.position)
        by_length.add(loss, labels, length - 1)
        done(tokens.numel())
        batch.clear()

    for document in documents:
        for start in range(0, len(document), seq_len):
            piece = document[start : start + seq_len].astype(np.int64)
            label = np.full(len(piece), IGNORE)
            following = document[start + 1 : start + seq_len + 1]
            label[: len(following)] = following
            if batch and size + len(piece) > batch_tokens:
                flush()
                size = 0
            batch.append((piece, label, len(document)))
            size += len(piece)
    if not batch and not by_position.sums[1].any():
        raise ValueError("there is no document of two tokens or more to measure the loss on")
    if batch:
        flush()
    return by_position, by_length
