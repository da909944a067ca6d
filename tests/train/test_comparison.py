import json

import numpy as np
import pytest

from sieve.train.comparison import FEW, Curve, compare, fit
from sieve.train.rundir import RunFiles


def smooth(x, y, at):
    return fit(x, y, at)[0]


def read(directory) -> RunFiles:
    return RunFiles.read(directory)


def test_smooth_keeps_a_straight_line_in_log_x_also_at_its_ends() -> None:
    x = np.arange(1.0, 101.0)
    at = np.array([1.0, 50.5, 100.0])
    np.testing.assert_allclose(smooth(x, 7 - 0.3 * np.log(x), at), 7 - 0.3 * np.log(at), rtol=1e-12)


@pytest.mark.parametrize(("points", "error"), [(10, 0.025), (FEW, 0.003), (100, 0.0005)])
def test_smooth_of_a_falling_loss_is_near_its_end(points: int, error: float) -> None:
    x = 1000 * np.arange(1.0, points + 1)
    loss = 2 + 6 * (x / 1000) ** -0.3
    assert abs(smooth(x, loss, x[-1:])[0] - loss[-1]) < error


def test_smooth_is_linear_takes_noise_out_and_skips_nan() -> None:
    generator = np.random.default_rng(0)
    x, a, b = np.arange(1.0, 301.0), generator.normal(size=300), generator.normal(size=300)
    at = np.array([250.0, 300.0])
    np.testing.assert_allclose(smooth(x, a, at) - smooth(x, b, at), smooth(x, a - b, at), atol=1e-12)
    assert abs(smooth(x, a, at)[0]) < 0.35
    a[299] = np.nan
    assert np.isfinite(smooth(x, a, at)).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_smooth_of_very_few_points(count: int) -> None:
    x = np.arange(1.0, count + 1)
    np.testing.assert_allclose(smooth(x, 2 + np.log(x), x[-1:]), 2 + np.log(x[-1:]), rtol=1e-6)


def test_the_error_is_that_of_many_draws() -> None:
    """What is found scatters as the error says, inside and at the end; of a straight line it is 0, of two points unknown."""
    generator = np.random.default_rng(1)
    x, at = np.arange(1.0, 61.0), np.array([30.0, 60.0])
    draws = [fit(x, 3 - 0.2 * np.log(x) + generator.normal(0, 0.1, 60), at) for _ in range(400)]
    found, errors = (np.array(part) for part in zip(*draws))
    np.testing.assert_allclose(np.sqrt((errors**2).mean(0)), found.std(0), rtol=0.15)
    assert found.std(0)[1] > 1.5 * found.std(0)[0]
    assert (fit(x, 3 - 0.2 * np.log(x), at)[1] < 1e-12).all() and np.isnan(fit(x[:2], x[:2], at)[1]).all()


def test_seconds_and_flops_are_cumulative_also_when_few_steps_are_logged(make_run) -> None:
    curve = Curve.of(read(make_run("a", steps=40, every=10, step_seconds=0.5, flops=2e6)))
    np.testing.assert_allclose(curve.seconds, [5, 10, 15, 20])
    np.testing.assert_allclose(curve.flops, np.array([10, 20, 30, 40]) * 1000 * 2e6)


def test_twins_differ_by_the_offset_whatever_the_noise(make_run) -> None:
    result = compare(read(make_run("nsa", offset=0.25)), read(make_run("full")))
    assert result.at_equal_tokens.amount == 40_000
    assert result.at_equal_tokens.gap == pytest.approx(0.25, abs=1e-9)
    assert result.at_equal_tokens.gap_error == pytest.approx(0.0, abs=1e-9)  # the noise is of the batches
    assert result.gap_std == pytest.approx(0.0, abs=1e-9)
    assert result.evaluation.run - result.evaluation.baseline == pytest.approx(0.25)
    assert result.same_tokens is True and result.matched_steps == 40 and result.notes == ()


def test_equal_seconds_takes_the_slow_run_at_its_end_and_the_fast_one_earlier(make_run) -> None:
    slow, fast = read(make_run("slow", step_seconds=2.0, steps=400)), read(make_run("fast", steps=400))
    at = compare(slow, fast).at_equal_seconds
    assert at.amount == pytest.approx(400.0)
    assert at.run == pytest.approx(3 + 5 / 200**0.5, abs=0.1)  # the slow one has done 200 steps by then
    assert at.baseline == pytest.approx(3 + 5 / 400**0.5, abs=0.1)
    assert at.gap > 0.03 and 0.005 < at.gap_error < 0.1  # other batches


def test_equal_flops_favours_the_cheaper_model(make_run) -> None:
    cheap, dear = read(make_run("cheap", flops=1e6, steps=400)), read(make_run("dear", flops=4e6, steps=400))
    at = compare(cheap, dear).at_equal_flops
    assert at.amount == pytest.approx(400 * 1000 * 1e6)
    assert at.baseline == pytest.approx(3 + 5 / 100**0.5, abs=0.1) and at.gap < -0.1


def test_ratios(make_run) -> None:
    result = compare(read(make_run("nsa", step_seconds=0.5, flops=5e5)), read(make_run("full")))
    assert result.tokens_per_second.ratio == pytest.approx(2.0)
    assert result.flops_per_token.ratio == pytest.approx(0.5)
    assert result.parameters.ratio == 1.0 and result.peak_memory_bytes.ratio == 1.0
    assert result.mfu.run is None and result.mfu.ratio is None


def test_different_tokens_are_told(make_run) -> None:
    result = compare(read(make_run("a", tag="x")), read(make_run("b")))
    assert result.same_tokens is False and result.first_difference_tokens == 1000
    assert "DIFFERENT tokens" in result.notes[0]


def test_a_shorter_run_is_compared_at_its_end_and_told(make_run) -> None:
    result = compare(read(make_run("short", steps=25)), read(make_run("long")))
    assert result.at_equal_tokens.amount == 25_000 and result.evaluation_tokens == 20_000
    assert any("differ in length" in note for note in result.notes)
    assert any("steps (25 against 40)" in note for note in result.notes)


@pytest.mark.parametrize("steps", [1, 5, 12, 30])
def test_a_run_and_its_own_beginning_do_not_differ(make_run, steps: int) -> None:
    """However few points: what the longer one went on to does not count. Nor at equal seconds and FLOPs."""
    result = compare(read(make_run("short", steps=steps)), read(make_run("long")))
    for at in (result.at_equal_tokens, result.at_equal_flops, result.at_equal_seconds):
        assert at.gap == 0.0 and at.amount > 0
    assert any(f"Fewer than 20 training losses were logged (short {steps})" in note for note in result.notes) == (steps < 20)


def test_an_unfinished_run_and_other_hardware_are_told(make_run) -> None:
    stopped = read(make_run("stopped", config={"steps": 90}))
    other = read(make_run("other", config={"steps": 90}, environment={"gpu": "NVIDIA H200", "device": "cuda"}))
    notes = compare(stopped, other).notes
    assert any("stopped is not finished: 40 of 90 steps" in note for note in notes)
    assert any("hardware differs (gpu: None against NVIDIA H200)" in note for note in notes)


def test_many_other_settings_are_folded(make_run) -> None:
    def note(count: int) -> str:
        own, run = ({"optim": {f"k{i:02}": i for i in range(n)}} for n in (0, count))
        made = [read(make_run(f"{name}{count}", config=config)) for name, config in (("a", run), ("b", own))]
        (found,) = (note for note in compare(*made).notes if note.startswith("Other settings"))
        return found

    listed = ["optim (null against {})", *(f"optim.k{i:02} ({i} against null)" for i in range(9))]
    assert note(9).endswith(f": {', '.join(listed)}.")
    assert note(41).endswith("optim.k08 (8 against null) and 32 more; config.yaml has them.")


def test_no_common_token_counts(make_run) -> None:
    result = compare(read(make_run("a", tokens=999)), read(make_run("b")))
    assert result.same_tokens is None and result.matched_steps == 0 and result.gap_std is None
    assert any("same token count" in note for note in result.notes)


def test_all_of_it_is_json(make_run) -> None:
    result = compare(read(make_run("a", flops=None)), read(make_run("b")))
    assert result.at_equal_flops is None
    assert json.loads(json.dumps(result.as_json()))["at_equal_tokens"]["gap"] == result.at_equal_tokens.gap
