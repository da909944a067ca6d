"""The schedule of a run: what a phase inherits, where it begins, how many steps tokens take."""

import pytest

from sieve.data.config import DataConfig
from sieve.data.phases import ONLY, Phase, phase_at, phases_of, steps_for

SIZES = dict(seq_len=100, global_batch=4, micro_batch=2)


def test_one_source_is_one_phase():
    (phase,) = phases_of(DataConfig(packing="best_fit", upsample={50: 2.0}), **SIZES)
    assert phase == Phase(0, 100, 4, 2, "best_fit", {ONLY: 1.0}, {ONLY: {50: 2.0}})


def test_a_phase_changes_what_it_names_and_keeps_the_rest():
    data = DataConfig(
        sources={"a": {"type": "python", "weight": 3, "upsample": {10: 2.0}}, "b": {"type": "python"}},
        phases=[
            {"from_tokens": 1000, "seq_len": 400, "global_batch": 1, "micro_batch": 1, "rope_factor": 4},
            {"from_tokens": 3000, "weights": {"a": 0, "b": 1}, "upsample": {7: 3.0}, "packing": "document"},
        ],
    )
    first, second, third = phases_of(data, **SIZES)
    assert first == Phase(0, 100, 4, 2, "concatenate", {"a": 3.0, "b": 1.0}, {"a": {10: 2.0}, "b": {}})
    assert second == Phase(1000, 400, 1, 1, "concatenate", first.weights, first.upsample, 4.0)
    assert [p.seq_len_key for p in (first, second, third)] == ["seq_len", *["data.phases[0].seq_len"] * 2]
    assert third == Phase(3000, 400, 1, 1, "document", {"a": 0.0, "b": 1.0}, {"a": {7: 3.0}, "b": {7: 3.0}}, 4.0)


@pytest.mark.parametrize("tokens, expected", [(0, 0), (999, 0), (1000, 1), (2999, 1), (3000, 2), (10**9, 2)])
def test_a_phase_begins_with_the_step_that_finds_its_tokens_read(tokens, expected):
    phases = [Phase(start, 100, 4, 2) for start in (0, 1000, 3000)]
    assert phase_at(phases, tokens) == expected


def test_steps_are_those_of_a_walk():
    phases = [Phase(0, 100, 4, 2), Phase(1000, 700, 1, 1), Phase(1100, 10, 3, 1)]
    done = walked = 0
    for tokens in range(1, 4000):
        while done < tokens:
            done += phases[phase_at(phases, done)].tokens_per_step
            walked += 1
        assert steps_for(phases, tokens) == walked, tokens
