"""Where packed documents and their compressed blocks lie, against counting on the host."""

import random

import pytest
import torch

from sieve.kernels.common.documents import Documents
from sieve.kernels.nsa.layout import CompressedSlots, Packing


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.choice([0, 1, 2, 3, 4, 5, 15, 16, 17, rng.randrange(100)]) for _ in range(rng.randrange(1, 30))] + [1]


LAYOUTS = [[1], [0, 5], [5, 0, 0], [16, 16], *map(random_lengths, range(20))]
layouts = pytest.mark.parametrize("lengths", LAYOUTS, ids=str)


@layouts
def test_documents_and_positions(packed, lengths):
    packing = packed(lengths)
    assert packing.doc.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert packing.position.tolist() == [t for n in lengths for t in range(n)]
    assert (packing.total_tokens, packing.num_documents) == (sum(lengths), len(lengths))


@pytest.mark.parametrize("cu", [torch.tensor([0, 4]), torch.tensor([[0, 4]]).int(), torch.tensor([0]).int()])
def test_cu_seqlens_of_another_kind(cu):
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        Packing.of(cu, 4, 4)


@layouts
@pytest.mark.parametrize("l, d", [(4, 4), (8, 4), (3, 1), (32, 16)])
def test_every_block_has_its_own_slot(packed, lengths, l, d):
    slots = CompressedSlots.of(packed(lengths), l, d)
    assert slots.start.numel() == sum(lengths) // d
    blocks, chunks, first = {}, {}, 0
    for n in lengths:
        for i in range(n // d):
            slot = first // d + i
            assert slot not in chunks
            chunks[slot] = (first + i * d, i * d)
            if i * d + l <= n:
                blocks[slot] = chunks[slot]
        first += n
    assert set(slots.valid.nonzero().flatten().tolist()) == set(blocks)
    assert set(slots.chunk.nonzero().flatten().tolist()) == set(chunks)
    for slot, (start, position) in chunks.items():
        assert (int(slots.start[slot]), int(slots.position[slot])) == (start, position)
    assert ((slots.start >= 0) & (slots.start < sum(lengths))).all()


@layouts
def test_padded_batches_go_there_and_back(packed, lengths):
    packing = packed(lengths)
    documents = Documents.of(packing)
    x = torch.arange(packing.total_tokens)
    taken = [batch.take(x) for batch in documents.batches]
    assert torch.equal(documents.join(taken), x)
    ends = packing.cu_seqlens.tolist()
    whole = {tuple(range(a, b)) for a, b in zip(ends, ends[1:]) if b > a}
    rows = [row.tolist() for batch in taken for row in batch]
    assert len(rows) == len(whole)
    for row in rows:  # a document, then anything
        assert any(tuple(row[: len(document)]) == document for document in whole)
    assert sum(len(row) for row in rows) <= 4 / 3 * sum(lengths) + 64 / 3 * len(whole)


def test_equal_documents_make_one_batch(packed):
    assert [tuple(b.token.shape) for b in Documents.of(packed([64, 64, 0, 64])).batches] == [(3, 64)]
