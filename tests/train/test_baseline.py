import json

import pytest

from sieve.train.baseline import Baseline, BaselineMismatch, steady


def record(step: int, *, tag: str = "h", loss: float = 5.0, rate: float = 2000.0) -> dict:
    return {
        "step": step, "tokens": step * 1000, "train/loss": loss, "perf/tokens_per_second": rate,
        "data/tokens_hash": f"{tag}{step}",
    }


def test_the_gap_is_ours_minus_theirs_at_the_same_tokens(make_run) -> None:
    baseline = Baseline.read(make_run("full"))
    theirs = baseline.by_tokens[7000]["train/loss"]
    found = baseline.compare(record(7), {})
    assert found == {
        "baseline/loss": theirs, "baseline/loss_gap": pytest.approx(5.0 - theirs),
        "baseline/speedup": pytest.approx(2.0),
    }


def test_the_speedup_is_over_the_steady_rate_not_the_first_slow_one(make_run) -> None:
    baseline = Baseline.read(make_run("full", steps=3))  # rates 100, 1000, 1000
    assert baseline.tokens_per_second == 1000.0


def test_other_token_counts_give_nothing(make_run) -> None:
    baseline = Baseline.read(make_run("full", every=10))
    assert baseline.compare(record(9, tag="other"), {}) == {}
    assert baseline.compare(record(41), {}) == {}
    assert set(baseline.compare(record(10), {})) == {"baseline/loss", "baseline/loss_gap", "baseline/speedup"}


def test_a_different_hash_is_refused_with_all_a_user_needs(make_run) -> None:
    baseline = Baseline.read(make_run("full", config={"seed": 3, "attention": {"type": "full"}}))
    ours = dict(baseline.run.config) | {"seed": 4, "attention.type": "nsa"}
    with pytest.raises(BaselineMismatch) as caught:
        baseline.compare(record(12, tag="x"), ours)
    message = str(caught.value)
    for part in ("12,000 tokens", "x12", "h12", "seed (here 4, there 3)", "baseline_mismatch=mark"):
        assert part in message
    assert str(baseline.run.directory) in message
    assert "attention" not in message


def test_a_different_hash_without_a_different_setting_blames_the_files(make_run) -> None:
    baseline = Baseline.read(make_run("full"))
    with pytest.raises(BaselineMismatch, match="No data setting differs"):
        baseline.compare(record(1, tag="x"), baseline.run.config)


def test_a_baseline_without_hashes_is_refused_at_once(make_run) -> None:
    directory = make_run("full")
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 10, "train/loss": 3.0}) + "\n")
    with pytest.raises(ValueError, match="no data/tokens_hash"):
        Baseline.read(directory)


def test_steady_is_the_median_without_the_first_tenth() -> None:
    rows = [{"step": i, "x": 0.0 if i < 3 else float(i)} for i in range(30)]
    assert steady(rows, "x") == 16.0
    assert steady(rows[:1], "x") == 0.0
    assert steady(rows, "y") is None
