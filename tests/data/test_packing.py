"""Rows against a plain-Python reading of the same stream: tokens, labels, cuts, epochs."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sieve.data.packers import Concatenate, Cursor
from sieve.data.packing import Batch, beginnings, edges
from sieve.data.rows import IGNORE, fill


class Documents:
    """A store's documents in a given order: what packers and rows read from."""

    def __init__(self, store, order):
        self.source, self.tokens, self.num_documents, self.document = "text", store, store.num_documents, order


class Row(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray
    starts: list[int]
    epoch: int


def read_row(store, order, cursor, seq_len):
    documents = Documents(store, order)
    plan, cursor = Concatenate(documents).row(cursor, seq_len)
    tokens, labels = np.empty((2, seq_len), np.int64)
    starts, labelled = fill(documents, plan, tokens, labels)
    assert labelled == (labels != IGNORE).sum()
    return Row(tokens, labels, starts, plan.epoch), cursor


def stack(rows):
    cu_seqlens, longest = edges([row.starts for row in rows], len(rows[0].tokens))
    tokens, labels = (torch.from_numpy(np.stack(x)) for x in ([r.tokens for r in rows], [r.labels for r in rows]))
    return Batch(tokens, labels, torch.from_numpy(cu_seqlens), longest)


def stored(epoch, position):
    return position


def backwards(n):
    return lambda epoch, position: n - 1 - position if epoch % 2 else position


def stream(documents, order, epochs):
    """(token, label, starts a document) of whole epochs, one after another."""
    for epoch in range(epochs):
        for position in range(len(documents)):
            ids = documents[order(epoch, position)]
            yield from ((t, ids[i + 1] if i + 1 < len(ids) else IGNORE, i == 0) for i, t in enumerate(ids))


@pytest.mark.parametrize("seq_len", [1, 7, 32, 100])
def test_rows_are_the_stream_cut(make_store, uneven, seq_len):
    store, order = make_store(uneven), backwards(len(uneven))
    expected = list(stream(uneven, order, 3))
    cursor = Cursor()
    for r in range(len(expected) // seq_len):
        row, cursor = read_row(store, order, cursor, seq_len)
        tokens, labels, begins = zip(*expected[r * seq_len : (r + 1) * seq_len])
        assert row.tokens.tolist() == list(tokens)
        assert row.labels.tolist() == list(labels)
        assert row.starts == [i for i, begin in enumerate(begins) if begin or i == 0]
        assert row.epoch == (r * seq_len + seq_len - 1) // store.num_tokens


def test_label_of_a_cut_is_the_documents_next_token(make_store):
    store = make_store([[1, 2, 3, 4, 5], [6, 7]])
    first, cursor = read_row(store, stored, Cursor(), 3)
    second, _ = read_row(store, stored, cursor, 3)
    assert first.labels.tolist() == [2, 3, 4]
    assert second.tokens.tolist() == [4, 5, 6] and second.labels.tolist() == [5, IGNORE, 7]
    assert second.starts == [0, 2]


def test_labels_never_cross_documents(make_store, uneven):
    store = make_store(uneven)
    cursor = Cursor()
    for _ in range(40):
        row, cursor = read_row(store, stored, cursor, 17)
        labelled = row.labels != IGNORE
        assert (row.labels[labelled] == row.tokens[labelled] + 1).all()  # the next of the same hundred
        assert labelled.any()


def test_cursor_is_canonical_at_every_edge(make_store):
    store = make_store([[1, 2], [3, 4, 5]])
    seen, cursor = [], Cursor()
    for _ in range(5):
        _, cursor = read_row(store, stored, cursor, 1)
        seen.append((cursor.epoch, cursor.position, cursor.offset))
    assert seen == [(0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0)]


def test_one_short_document_fills_a_row_by_epochs(make_store):
    row, cursor = read_row(make_store([[1, 2, 3]]), stored, Cursor(), 7)
    assert row.tokens.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert row.labels.tolist() == [2, 3, IGNORE, 2, 3, IGNORE, 2]
    assert row.starts == [0, 3, 6] and row.epoch == 2 and cursor == Cursor(2, 0, 1)


def test_batch_has_boundaries_at_documents_and_rows(make_store):
    store = make_store([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]])
    first, cursor = read_row(store, stored, Cursor(), 4)
    second, _ = read_row(store, stored, cursor, 4)
    batch = stack([first, second])
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [[2, 3, 4, 5], [IGNORE, 7, IGNORE, 9]]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7, 8] and batch.max_seqlen == 4
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32


def test_batch_moves(make_store, uneven):
    row, _ = read_row(make_store(uneven), stored, Cursor(), 16)
    batch = stack([row])
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens) and moved.max_seqlen == batch.max_seqlen


def test_wide_ids_survive(make_store):
    row, _ = read_row(make_store([[70_000, 4_000_000]], 1 << 22), stored, Cursor(), 2)
    assert row.tokens.tolist() == [70_000, 4_000_000] and row.tokens.dtype == np.int64


def test_beginnings_are_all_rows_cut_alike(make_store, uneven):
    store = make_store(uneven)
    rows, cursor = [], Cursor()
    for _ in range(6):
        row, cursor = read_row(store, stored, cursor, 30)
        rows.append(row)
    batches = [stack(rows[i : i + 2]) for i in (0, 2, 4)]
    found = beginnings(batches)
    cut = [Row(r.tokens[:10], r.labels[:10], [s for s in r.starts if s < 10], r.epoch) for r in rows]
    wanted = stack(cut)
    assert found.tokens.shape == (6, 10) and found.padding is None and found.max_seqlen == wanted.max_seqlen
    for name in ("tokens", "labels", "cu_seqlens"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    whole = beginnings(batches[:1])
    assert torch.equal(whole.tokens, batches[0].tokens) and torch.equal(whole.cu_seqlens, batches[0].cu_seqlens)


def test_beginnings_keep_padding(make_store, uneven):
    rows, cursor = [], Cursor()
    for _ in range(2):
        row, cursor = read_row(make_store(uneven), stored, cursor, 7)
        rows.append(row)
    first, second = stack(rows[:1]), stack(rows[1:])
    padding = torch.zeros(1, 7, dtype=torch.bool)
    padding[0, 2:] = True
    found = beginnings([first, replace(second, padding=padding)])
    assert found.tokens.shape == (2, 4)  # 7 tokens a row by two batches, rounded up
    assert found.padding.tolist() == [[False] * 4, [False, False, True, True]]
