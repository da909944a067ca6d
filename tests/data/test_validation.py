"""Validation's rows: the store's first, whole, the same ones for every division among ranks."""

import pytest
import torch

from sieve.data.rows import IGNORE
from sieve.data.validation import validation_batches


def test_validation_is_the_first_whole_rows(make_store, uneven):
    store = make_store(uneven)
    flat = [t for ids in uneven for t in ids]
    batches = list(validation_batches(store, 16, 1, 5))
    assert [b.tokens.flatten().tolist() for b in batches] == [flat[i * 16 : i * 16 + 16] for i in range(5)]
    everything = list(validation_batches(store, 16, 1, None))
    assert len(everything) == len(flat) // 16
    again = list(validation_batches(store, 16, 1, 5))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches, again))


@pytest.mark.parametrize("world_size, micro_batch", [(1, 2), (1, 8), (2, 2), (4, 1)])
def test_validation_sums_do_not_depend_on_the_division(make_store, uneven, world_size, micro_batch):
    store = make_store(uneven)
    expected = torch.cat([b.labels for b in validation_batches(store, 16, 1, 5)])
    ranks = [list(validation_batches(store, 16, micro_batch, 5, rank=r, world_size=world_size))
             for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    found = torch.cat([b.labels for batches in ranks for b in batches])
    found = found[(found != IGNORE).any(1)]
    assert all(len(b.tokens) == micro_batch for batches in ranks for b in batches)
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_validation_too_small_says_so_at_once(make_store, uneven):
    with pytest.raises(ValueError, match="validation text has .* less than one row; raise data.validation_fraction"):
        validation_batches(make_store(uneven), 10_000, 1)
    with pytest.raises(ValueError, match=r"^data.phases\[0\].seq_len=10000, but .* or lower data.phases\[0\].seq_len$"):
        validation_batches(make_store(uneven), 10_000, 1, seq_len_key="data.phases[0].seq_len")
    with pytest.raises(ValueError, match="max_rows=0"):
        validation_batches(make_store(uneven), 16, 1, 0)
