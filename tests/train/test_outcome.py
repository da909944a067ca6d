"""Outcomes that the host reads a step late, as on a GPU: what it then knows at each moment."""

import json
import types

import pytest
import torch

from sieve.train.guard import Guard, GuardConfig
from sieve.train.outcome import Ledger, Outcome


@pytest.fixture
def run(tmp_path):
    config = types.SimpleNamespace(guard=GuardConfig(max_in_a_row=2))
    return types.SimpleNamespace(config=config, rank=0, directory=tmp_path, guard=None, failure=None, step=0)


def outcome(run, loss, record=None):
    run.step += 1
    step = types.SimpleNamespace(labelled=2, state={"hash": "h"}, epoch=0, metrics={}, documents=[f"text/{run.step}"])
    bad = loss != loss
    return Outcome(run.step, step, {"at": run.step - 1}, 0.1, record, torch.tensor([2 * loss, bad, 1.0], dtype=torch.float64))


def skipped(run):
    path = run.directory / "skipped.jsonl"
    return [(row["step"], row["documents"], row["data"]) for row in map(json.loads, path.read_text().splitlines())]


def test_a_step_is_judged_one_later_but_for_what_is_asked_for(run):
    ledger = Ledger(Guard(run.config.guard), lag=True)
    ledger.add(run, outcome(run, float("nan")), now=False)
    assert run.guard is None
    ledger.add(run, outcome(run, 3.0), now=False)
    assert run.guard["skipped"] == 1 and run.guard["in_a_row"] == 1
    assert skipped(run) == [(1, ["text/1"], {"at": 0})]
    ledger.add(run, outcome(run, 4.0, record := {"step": 3}), now=True)
    assert run.guard["in_a_row"] == 0
    assert record["train/loss"] == 4.0 and record["train/skipped"] == 1 and record["train/grad_norm"] == 1.0


def test_it_gives_up_one_step_later_and_has_judged_all_by_then(run):
    ledger = Ledger(Guard(run.config.guard), lag=True)
    for number in range(1, 4):
        ledger.add(run, outcome(run, float("nan")), now=False)
        assert (run.failure is None) == (number < 3)
    assert run.failure.startswith("steps 1 to 2: ") and run.guard["skipped"] == 3  # the third is in what is saved
    assert [row[0] for row in skipped(run)] == [1, 2, 3]


def test_without_lag_a_step_is_judged_at_once(run):
    ledger = Ledger(Guard(run.config.guard), lag=False)
    ledger.add(run, outcome(run, float("nan")), now=False)
    assert run.guard["skipped"] == 1
