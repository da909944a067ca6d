"""Global steps of rows for one rank, each with the state to go on from; and the fixed rows of validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sieve.data.packing import IGNORE, Batch, Cursor, Row, read_row, stack
from sieve.data.shuffle import DocumentOrder
from sieve.data.store import TokenStore


@dataclass(frozen=True)
class Step:
    """One global step as one rank sees it.

    micro_batches: this rank's, in order. state: JSON-able, where the next step begins. epoch: of the step's last
    token, from 0. tokens: of the whole global step, every rank's. labelled: how many of those have a label, what a
    mean over the global batch divides by.
    """

    micro_batches: list[Batch]
    state: dict[str, Any]
    epoch: int
    tokens: int
    labelled: int


class RowLoader:
    """Endless iterator of Steps over a store; its `state` travels with every Step and resumes bit for bit.

    Rows are numbered over the whole run; a global step takes the next `global_batch` of them, and micro-batch m of
    rank r is rows (m * world_size + r) * micro_batch and following of those. Every rank reads all rows, from a memory
    map, so that state and hash need no communication and depend on neither ranks nor micro_batch.

    State: {epoch, position, offset} of the next token (see packing.Cursor), tokens consumed so far, hash (hex, rolled
    over every row's tokens in global row order), and seed and store, which a resumed loader must share.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        state: dict[str, Any] | None = None,
    ):
        """global_batch, micro_batch: in rows. Raises ValueError when they do not divide, when the store holds less
        than a row, or when `state` belongs to another store or seed."""
        _check_batch(global_batch, micro_batch, rank, world_size)
        if store.num_tokens < seq_len or seq_len < 1:
            raise ValueError(
                f"seq_len={seq_len}, but the training text has {store.num_tokens} tokens in {store.num_documents} "
                "documents, less than one row; lower seq_len, or give more text (data.paths, data.max_bytes)"
            )
        self._store, self._seq_len, self._global_batch = store, seq_len, global_batch
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._order = DocumentOrder(store.num_documents, seed)
        start = {"epoch": 0, "position": 0, "offset": 0, "tokens": 0, "hash": "", "seed": seed, "store": store.id}
        self._state = dict(start) if state is None else _checked(state, start, store)

    @property
    def state(self) -> dict[str, Any]:
        """Where the next Step begins."""
        return dict(self._state)

    def __iter__(self) -> RowLoader:
        return self

    def __next__(self) -> Step:
        cursor = Cursor(*(self._state[key] for key in ("epoch", "position", "offset")))
        digest, labelled, mine = self._state["hash"], 0, []
        for i in range(self._global_batch):
            row, cursor = read_row(self._store, self._order.at, cursor, self._seq_len)
            digest = roll(digest, row.tokens)
            labelled += int(np.count_nonzero(row.labels != IGNORE))
            if i // self._micro_batch % self._world_size == self._rank:
                mine.append(row)
        tokens = self._global_batch * self._seq_len
        self._state = {
            **self._state, "epoch": cursor.epoch, "position": cursor.position, "offset": cursor.offset,
            "tokens": self._state["tokens"] + tokens, "hash": digest,
        }
        batches = [stack(mine[i : i + self._micro_batch]) for i in range(0, len(mine), self._micro_batch)]
        return Step(batches, self.state, row.epoch, tokens, labelled)


def roll(digest: str, tokens: np.ndarray) -> str:
    """The hash (hex, 128 bits) after a row, from the one before it ("" before the first) and the row's tokens."""
    return hashlib.blake2b(bytes.fromhex(digest) + tokens.astype("<u4").tobytes(), digest_size=16).hexdigest()


def validation_batches(
    store: TokenStore,
    seq_len: int,
    micro_batch: int,
    max_rows: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of the store's first rows, the same ones every time: documents in the store's own order.

    Only whole rows count: what is left after the last is dropped. `max_rows` (None: all) bounds them over all ranks.
    Every rank gets the same number of full micro-batches, because collectives must be met by all: where rows run out,
    the last row is repeated with no labels, which adds nothing to a sum over labelled tokens.
    Raises ValueError at the call if the store has not one whole row.
    """
    whole = store.num_tokens // seq_len
    if whole < 1:
        raise ValueError(
            f"seq_len={seq_len}, but the validation text has {store.num_tokens} tokens in {store.num_documents} "
            "documents, less than one row; raise data.validation_fraction, give data.validation_paths or lower seq_len"
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}; validation needs at least one row")
    rows = whole if max_rows is None else min(whole, max_rows)
    return _validation(store, seq_len, micro_batch, rows, rank, world_size)


def _validation(
    store: TokenStore, seq_len: int, micro_batch: int, rows: int, rank: int, world_size: int
) -> Iterator[Batch]:
    cursor, mine = Cursor(), []
    stride = micro_batch * world_size
    for i in range(-(-rows // stride) * stride):
        if i < rows:
            row, cursor = read_row(store, _as_stored, cursor, seq_len)
        else:
            row = Row(row.tokens, np.full_like(row.labels, IGNORE), row.starts, row.epoch)
        if i // micro_batch % world_size == rank:
            mine.append(row)
        if len(mine) == micro_batch:
            yield stack(mine)
            mine = []


def _as_stored(epoch: int, position: int) -> int:
    return position


def _check_batch(global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
    if min(global_batch, micro_batch, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"global_batch={global_batch}, micro_batch={micro_batch}, world_size={world_size}, rank={rank}; the first "
            "three must be at least 1 and 0 <= rank < world_size"
        )
    group = micro_batch * world_size
    if global_batch % group:
        near = sorted({max(global_batch // group, 1) * group, (global_batch // group + 1) * group})
        fix = f"choose global_batch={' or '.join(map(str, near))}"
        if global_batch % world_size == 0:
            share = global_batch // world_size
            fix += f", or micro_batch={' or '.join(str(d) for d in range(1, share + 1) if share % d == 0)}"
        raise ValueError(
            f"global_batch={global_batch} is not divisible by micro_batch * world_size = {micro_batch} * {world_size} "
            f"= {group}; {fix}"
        )


def _checked(state: dict[str, Any], start: dict[str, Any], store: TokenStore) -> dict[str, Any]:
    missing = sorted(set(start) - set(state))
    if missing:
        raise ValueError(f"the data state lacks {', '.join(missing)}; it has {', '.join(sorted(state)) or 'nothing'}")
    for key, fix in (
        ("store", "the training text or its tokenizer changed; restore both, or start a new run"),
        ("seed", "another seed is another order; restore it, or start a new run"),
    ):
        if state[key] != start[key]:
            raise ValueError(f"cannot resume: the data state has {key}={state[key]}, this run {start[key]}; {fix}")
    cursor = Cursor(state["epoch"], state["position"], state["offset"])
    if cursor.epoch < 0 or cursor.offset < 0 or not 0 <= cursor.position < store.num_documents:
        raise ValueError(f"the data state's {cursor} is outside of {store.num_documents} documents; it is damaged")
    return {key: state[key] for key in start}
