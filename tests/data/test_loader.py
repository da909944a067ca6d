"""The loader: exactly once an epoch, the same for every division among ranks, and resumable to the bit."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from sieve.data.loader import RowLoader
from sieve.data.phases import Phase
from sieve.data.rows import IGNORE, roll, row_hash

SHAPE = dict(seq_len=16, global_batch=8, micro_batch=2, seed=5)


def loader_of(store, *, seq_len, global_batch, micro_batch, **settings):
    """One source, one phase, documents laid end to end: what a run has that asks for nothing else."""
    return RowLoader({"text": store}, [Phase(0, seq_len, global_batch, micro_batch)], **settings)


def take(loader, steps):
    return list(islice(loader, steps))


def rows(steps):
    """[rows, seq_len] of one rank."""
    return torch.cat([batch.tokens for step in steps for batch in step.micro_batches])


def same(left, right):
    assert left.state == right.state and left.epoch == right.epoch
    assert (left.tokens, left.labelled) == (right.tokens, right.labelled)
    for a, b in zip(left.micro_batches, right.micro_batches, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.cu_seqlens, b.cu_seqlens) and a.max_seqlen == b.max_seqlen


def test_every_token_once_an_epoch(make_store, uneven):
    store = make_store(uneven)
    seen = rows(take(loader_of(store, seq_len=1, global_batch=1, micro_batch=1), 2 * store.num_tokens)).flatten()
    for epoch in seen.split(store.num_tokens):
        assert Counter(epoch.tolist()) == Counter(t for ids in uneven for t in ids)
    first, second = seen.split(store.num_tokens)
    assert not torch.equal(first, second)


def test_every_token_once_in_rows_that_do_not_divide_the_epoch(make_store, uneven):
    store = make_store(uneven)
    steps = take(loader_of(store, **SHAPE), 30)
    seen = rows(steps).flatten()[: store.num_tokens * 5]
    assert set(Counter(seen.tolist()).values()) == {5}
    assert steps[-1].epoch == (30 * 128 - 1) // store.num_tokens
    assert [s.epoch for s in steps] == sorted(s.epoch for s in steps)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_rows_and_state_do_not_depend_on_ranks(make_store, uneven, world_size, micro_batch):
    store = make_store(uneven)
    whole = take(loader_of(store, **SHAPE), 3)
    ranks = [take(loader_of(store, **{**SHAPE, "micro_batch": micro_batch}, rank=r, world_size=world_size), 3)
             for r in range(world_size)]
    for s, step in enumerate(whole):
        expected = rows([step])
        for r in range(world_size):
            assert ranks[r][s].state == step.state
            assert (ranks[r][s].tokens, ranks[r][s].labelled) == (step.tokens, step.labelled)
            for m, batch in enumerate(ranks[r][s].micro_batches):
                first = (m * world_size + r) * micro_batch
                assert torch.equal(batch.tokens, expected[first : first + micro_batch])
        assert sum(len(ranks[r][s].micro_batches) for r in range(world_size)) * micro_batch == SHAPE["global_batch"]


def test_step_counts(make_store, uneven):
    for step in take(loader_of(make_store(uneven), **SHAPE), 5):
        assert step.tokens == 128
        assert step.labelled == sum(int((b.labels != IGNORE).sum()) for b in step.micro_batches)
        assert 0 < step.labelled < 128


def test_resume_twice_in_a_row(make_store, uneven):
    store = make_store(uneven)
    straight = take(loader_of(store, **SHAPE), 14)
    resumed, state = [], None
    for steps in (3, 6, 5):  # across epoch ends: an epoch is about four steps
        loader = loader_of(store, **SHAPE, state=state)
        resumed += take(loader, steps)
        state = json.loads(json.dumps(loader.state))
    for left, right in zip(straight, resumed, strict=True):
        same(left, right)


def test_resume_from_every_step(make_store, uneven):
    store = make_store(uneven)
    straight = take(loader_of(store, **SHAPE), 12)
    for i, step in enumerate(straight[:-1]):
        same(next(loader_of(store, **SHAPE, state=step.state)), straight[i + 1])


def test_resume_with_another_division(make_store, uneven):
    store = make_store(uneven)
    straight = take(loader_of(store, **SHAPE), 6)
    state = straight[2].state
    other = {**SHAPE, "micro_batch": 1, "world_size": 2, "state": state}
    ranks = [take(loader_of(store, **other, rank=r), 3) for r in range(2)]
    assert ranks[0][-1].state == ranks[1][-1].state == straight[-1].state
    assert torch.equal(rows([ranks[1][0]]), rows([straight[3]])[1::2])


def test_leaving_the_loop_loses_nothing(make_store, uneven):
    store = make_store(uneven)
    loader = loader_of(store, **SHAPE)
    for _ in loader:
        break
    assert loader.state["tokens"] == 128
    same(next(loader), take(loader_of(store, **SHAPE), 2)[1])


def test_hash_is_rolled_over_rows_in_global_order(make_store, uneven):
    steps = take(loader_of(make_store(uneven), **SHAPE), 2)
    digest = ""
    for row in rows(steps).numpy():
        digest = roll(digest, [row_hash(row)])
    assert digest == steps[-1].state["hash"] != steps[0].state["hash"]
    assert len(digest) == 32


def test_hash_changes_with_one_token(make_store, uneven):
    before = take(loader_of(make_store(uneven), **SHAPE), 4)
    changed = [list(ids) for ids in uneven]
    changed[7][1] += 50
    after = take(loader_of(make_store(changed), **SHAPE), 4)
    assert (rows(before) != rows(after)).sum() >= 1
    assert before[-1].state["hash"] != after[-1].state["hash"]


def test_hash_tells_the_order_of_rows():
    a, b = np.arange(4), np.arange(4) + 9
    a, b = row_hash(a), row_hash(b)
    assert roll(roll("", [a]), [b]) == roll("", [a, b]) != roll("", [b, a])


def test_seed_sets_the_order(make_store, uneven):
    store = make_store(uneven)
    first, again, other = (rows(take(loader_of(store, **{**SHAPE, "seed": s}), 2)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("wrong, said", [
    (dict(global_batch=10, micro_batch=4, world_size=2), r"4 \* 2 = 8; choose global_batch=8 or 16, or .*=1 or 5$"),
    (dict(global_batch=3, micro_batch=4), r"choose global_batch=4, or micro_batch=1 or 3$"),
    (dict(global_batch=3, micro_batch=1, world_size=2), r"choose global_batch=2 or 4$"),
    (dict(global_batch=0), "global_batch=0"),
    (dict(rank=1), "rank=1"),
    (dict(seq_len=10_000), "seq_len=10000, but the training text has .* less than one row"),
])
def test_wrong_shapes_are_refused(make_store, uneven, wrong, said):
    with pytest.raises(ValueError, match=said):
        loader_of(make_store(uneven), **{**SHAPE, **wrong})


def test_another_store_or_seed_cannot_resume(make_store, uneven):
    store = make_store(uneven)
    state = next(loader_of(store, **SHAPE)).state
    with pytest.raises(ValueError, match="sources.text=.*tokenizer or the mixture changed"):
        loader_of(make_store(uneven[:-1]), **SHAPE, state=state)
    with pytest.raises(ValueError, match="seed=5, this run 6"):
        loader_of(store, **{**SHAPE, "seed": 6}, state=state)
    with pytest.raises(ValueError, match="lacks hash"):
        loader_of(store, **SHAPE, state={k: v for k, v in state.items() if k != "hash"})
    with pytest.raises(ValueError, match="damaged"):
        loader_of(store, **SHAPE, state={**state, "buckets": {"text": {**state["buckets"]["text"], "cursor": [0, 23, 0, 0]}}})
