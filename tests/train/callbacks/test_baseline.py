import logging

import pytest

from sieve.train.baseline import BaselineMismatch
from sieve.train.callbacks.baseline import BaselineCallback, resolve_baseline


def record(step: int, tag: str = "h") -> dict:
    return {"step": step, "tokens": step * 1000, "train/loss": 5.0, "data/tokens_hash": f"{tag}{step}"}


def test_each_matched_record_gets_the_gap(make_run, make_state) -> None:
    callback, state = BaselineCallback(make_run("full", every=2), mismatch="refuse"), make_state()
    logged = [record(step) for step in (1, 2, 3, 4)]
    for each in [*logged, None]:
        callback.step(state, each)
    assert ["baseline/loss_gap" in each for each in logged] == [False, True, False, True]


def test_other_tokens_are_refused_or_marked(make_run, make_state, caplog) -> None:
    directory, state = make_run("full"), make_state()
    with pytest.raises(BaselineMismatch, match="baseline_mismatch=mark"):
        BaselineCallback(directory, mismatch="refuse").step(state, record(3, "x"))
    callback = BaselineCallback(directory, mismatch="mark")
    logged = [record(3, "x"), record(4, "x")]
    for each in logged:
        callback.step(state, each)
    assert all(each["baseline/mismatch"] == 1 and "baseline/loss_gap" in each for each in logged)
    assert len(caplog.records) == 1


def test_a_baseline_that_never_matches_is_told_once(make_run, make_state, caplog) -> None:
    callback, state = BaselineCallback(make_run("full", tokens=999), mismatch="refuse"), make_state()
    with caplog.at_level(logging.WARNING):
        for step in (1, 40, 41):
            callback.step(state, record(step))
    assert [r.message for r in caplog.records if "same token count" in r.message] == [caplog.records[0].message]


def test_resolving_names_the_key_and_the_fix(make_run) -> None:
    directory = make_run("full")
    runs = directory.parent
    assert resolve_baseline("full", runs, runs / "nsa") == directory
    assert resolve_baseline(str(directory), "elsewhere", runs / "nsa") == directory
    with pytest.raises(ValueError, match=r"baseline=ful: .*did you mean .*full\?$"):
        resolve_baseline("ful", runs, runs / "nsa")
    with pytest.raises(ValueError, match="own directory"):
        resolve_baseline("full", runs, directory)
