"""The stream against a slow plain-Python model of it: every packing, mixtures, phases, stops, ranks."""

import json
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sieve.data import best_fit
from sieve.data.loader import RowLoader
from sieve.data.phases import Phase

WINDOW = 3  # rows of a best-fit window, so that small texts have several


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "WINDOW_ROWS", WINDOW)
        yield


def global_rows(steps_by_rank, phases):
    """(tokens, labels) in global order, from what every rank got."""
    rows = []
    for steps in zip(*steps_by_rank):
        batches = [step.micro_batches for step in steps]
        for together in zip(*batches):
            for batch in together:
                rows += list(zip(batch.tokens.tolist(), batch.labels.tolist()))
    return rows


def read(sources, phases, seed, stops, worlds, workers=0):
    """Rows of a run that is stopped after `stops` steps each and goes on with the next number of ranks."""
    state, rows = None, []
    for steps, world in zip(stops, worlds):
        loaders = [
            RowLoader(sources, phases, seed=seed, rank=rank, world_size=world, workers=workers, state=state)
            for rank in range(world)
        ]
        by_rank = [list(islice(loader, steps)) for loader in loaders]
        for loader in loaders:
            loader.close()
        assert all(ours.state == theirs.state for ours, theirs in zip(by_rank[0], by_rank[-1]))
        rows += global_rows(by_rank, phases)
        if steps:
            state = json.loads(json.dumps(by_rank[0][-1].state))
    return rows, state


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)
factors = st.dictionaries(st.sampled_from([0, 5, 12, 30]), st.sampled_from([0.5, 1.0, 2.0, 3.5]), max_size=2)


@st.composite
def runs(draw):
    names = ["books", "code", "web"][: draw(st.integers(1, 3))]
    sources = {name: [*draw(sizes), 16] for name in names}
    phases, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]), min_size=len(names), max_size=len(names)))
        phases.append(Phase(
            start, draw(st.sampled_from([3, 8, 16])), 4, 1, draw(st.sampled_from(["concatenate", "best_fit", "document"])),
            dict(zip(names, [*weights[:-1], weights[-1] or 1.0])), {name: draw(factors) for name in names},
        ))
        start += draw(st.integers(1, 200))
    return sources, phases


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    run=runs(), seed=st.integers(0, 2**63 - 1),
    stops=st.lists(st.integers(0, 5), min_size=2, max_size=4), worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=4),
)
def test_rows_are_the_models_whatever_the_stops_and_ranks(plain, run, seed, stops, worlds):
    sizes, phases = run
    sources = {name: plain.ListTokens(own, number) for number, (name, own) in enumerate(sizes.items())}
    found, state = read(sources, phases, seed, stops, worlds)
    documents = {name: tokens.documents for name, tokens in sources.items()}
    expected = plain.plain_stream(documents, phases, seed, sum(stops), WINDOW)
    assert found == [(tokens, labels) for _, tokens, labels in expected]
    if sum(stops):
        undisturbed, again = read(sources, phases, seed, [sum(stops)], [1])
        assert again == state and undisturbed == found


MIXTURE = {"books": [3, 90, 7, 41, 5, 60, 2, 33], "code": [4, 9, 2, 17, 6, 8, 11, 3, 5]}
PHASES = {
    "concatenate": "concatenate", "best_fit": "best_fit", "document": "document", "cut then fit": "best_fit",
    "fit then document": "document",
}


def phases_of(name):
    first = {"cut then fit": "concatenate", "fit then document": "best_fit"}.get(name, name)
    return [
        Phase(0, 16, 8, 2, first, {"books": 0.7, "code": 0.3}),
        Phase(500, 32, 4, 1, PHASES[name], {"books": 0.9, "code": 0.1}, {"books": {40: 2.0}}),
    ]


@pytest.mark.parametrize("name", PHASES)
def test_rows_do_not_depend_on_workers_ranks_and_stops(plain, name):
    phases = phases_of(name)
    mixture = {name: plain.ListTokens(sizes, number) for number, (name, sizes) in enumerate(MIXTURE.items())}
    expected, state = read(mixture, phases, 3, [9], [1])
    assert len(expected) == 4 * 8 + 5 * 4, "the phase does not change in these steps"
    documents = {name: tokens.documents for name, tokens in mixture.items()}
    assert expected == [(t, labels) for _, t, labels in plain.plain_stream(documents, phases, 3, 9, WINDOW)]
    for workers, stops, worlds in [
        (1, [9], [1]), (4, [9], [1]), (0, [9], [2]), (0, [9], [4]), (4, [2, 1, 3, 3], [1, 2, 4, 2]), (1, [4, 1, 4], [4, 1, 2]),
    ]:
        assert read(mixture, phases, 3, stops, worlds, workers) == (expected, state), (workers, stops, worlds)


def test_short_documents_are_not_cut_by_best_fit(plain):
    tokens = plain.ListTokens([3, 90, 7, 41, 5, 16, 2, 33, 15, 8, 8, 9])
    loader = RowLoader({"text": tokens}, [Phase(0, 16, 1, 1, "best_fit")])
    whole = [ids for ids in tokens.documents if len(ids) <= 16]
    seen = []
    while loader.state["buckets"]["text"]["cursor"][0] == 0:
        step = next(loader)
        (batch,) = step.micro_batches
        cu = batch.cu_seqlens.tolist()
        pieces = [batch.tokens[0, a:b].tolist() for a, b in zip(cu, cu[1:]) if batch.padding is None or not batch.padding[0, a]]
        seen += pieces
    assert all(ids in seen for ids in whole)
    flat = sorted(t for piece in seen for t in piece)
    assert flat == sorted(t for ids in tokens.documents for t in ids), "each token once an epoch"


def test_padding_is_short_segments_of_its_own_without_labels(plain):
    loader = RowLoader({"text": plain.ListTokens([100, 1000])}, [Phase(0, 400, 2, 2, "document")])
    seen = {}
    for step in islice(loader, 2):
        (batch,) = step.micro_batches
        cu = batch.cu_seqlens.tolist()
        assert cu[0] == 0 and cu[-1] == 800 and cu == sorted(set(cu)) and 400 in cu
        for a, b in zip(cu, cu[1:]):
            pad = batch.padding.flatten()[a:b]
            assert pad.all() or not pad.any()
            assert not pad.any() or b - a <= 64
        assert (batch.labels[batch.padding] == -100).all() and (batch.tokens[batch.padding] == 0).all()
        assert step.labelled == (batch.labels != -100).sum() and batch.max_seqlen == max(b - a for a, b in zip(cu, cu[1:]))
        seen |= step.metrics
        share = batch.padding.double().mean().item()
        assert step.metrics["data/padding_share"] == pytest.approx(share) and step.metrics["data/documents_per_row"] == 1
    assert seen["data/context_over_8k"] == 0


def test_context_is_counted_behind_each_token(plain):
    tokens = plain.ListTokens([40_000, 10_000])
    steps = list(islice(RowLoader({"text": tokens}, [Phase(0, 40_000, 1, 1, "document")]), 2))
    by_size = {step.labelled + 1: step.metrics for step in steps}
    assert by_size[40_000]["data/context_over_8k"] == (40_000 - 8193) / 40_000
    assert by_size[40_000]["data/context_over_32k"] == (40_000 - 32_769) / 40_000
    assert by_size[10_000]["data/context_over_8k"] == (10_000 - 8193) / 10_000
    assert by_size[10_000]["data/context_over_32k"] == 0


def test_concatenation_says_nothing_of_padding(plain):
    (batch,) = next(RowLoader({"text": plain.ListTokens([5, 9])}, [Phase(0, 4, 1, 1)])).micro_batches
    assert batch.padding is None and isinstance(batch.tokens, torch.Tensor)
