"""The fixed rows on which validation measures the loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sieve.data.buckets import AsStored
from sieve.data.packers import Concatenate, Cursor, RowPlan
from sieve.data.packing import Batch, edges
from sieve.data.rows import IGNORE, fill
from sieve.data.tokens import Tokens


def validation_batches(
    store: Tokens,
    seq_len: int,
    micro_batch: int,
    max_rows: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    source: str = "",
    seq_len_key: str = "seq_len",
) -> Iterator[Batch]:
    """This rank's share of the store's first rows, the same ones every time: documents in the store's own order.

    Only whole rows count: what is left after the last is dropped. `max_rows` (None: all) bounds them over all ranks.
    Every rank gets the same number of full micro-batches, because collectives must be met by all: where rows run out,
    the last row is repeated with no labels, which adds nothing to a sum over labelled tokens. source: of a mixture, and
    seq_len_key: the setting that gave seq_len, for messages. Raises ValueError at the call if the store has not one whole row.
    """
    whole = store.num_tokens // seq_len
    if whole < 1:
        raise ValueError(
            f"{seq_len_key}={seq_len}, but the validation text{f' of {source}' if source else ''} has {store.num_tokens} "
            f"tokens in {store.num_documents} documents, less than one row; raise data.validation_fraction, give "
            f"data.validation_paths or lower {seq_len_key}"
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}; validation needs at least one row")
    rows = whole if max_rows is None else min(whole, max_rows)
    return _batches(AsStored(source, store), seq_len, micro_batch, rows, rank, world_size)


def _batches(
    documents: AsStored, seq_len: int, micro_batch: int, rows: int, rank: int, world_size: int
) -> Iterator[Batch]:
    plans = _plans(documents, seq_len, rows)
    stride = micro_batch * world_size
    mine: list[tuple[RowPlan, bool]] = []
    for i in range(-(-rows // stride) * stride):
        planned = next(plans)
        if i // micro_batch % world_size == rank:
            mine.append(planned)
        if len(mine) == micro_batch:
            yield _batch(documents, seq_len, mine)
            mine = []


def _plans(documents: AsStored, seq_len: int, rows: int) -> Iterator[tuple[RowPlan, bool]]:
    """The rows, each with whether it counts; then the last, which does not, without end."""
    packer, cursor = Concatenate(documents), Cursor()
    for _ in range(rows):
        plan, cursor = packer.row(cursor, seq_len)
        yield plan, True
    while True:
        yield plan, False


def _batch(documents: AsStored, seq_len: int, planned: list[tuple[RowPlan, bool]]) -> Batch:
    tokens, labels = np.empty((2, len(planned), seq_len), np.int64)
    starts = []
    for i, (plan, counts) in enumerate(planned):
        begins, _ = fill(documents, plan, tokens[i], labels[i])
        starts.append(begins)
        if not counts:
            labels[i] = IGNORE
    cu_seqlens, longest = edges(starts, seq_len)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(cu_seqlens), longest)
