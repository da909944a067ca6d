
import pytest
import torch

from sieve.train.callbacks.speed import Speed


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def advance(speed: Speed, clock: Clock, state, seconds: float, tokens: int, record: dict | None) -> None:
    clock.now += seconds
    state.step, state.tokens = state.step + 1, state.tokens + tokens
    speed.step(state, record)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_means_over_the_steps_since_the_last_record(make_state, clock: Clock) -> None:
    speed, state, record = Speed(torch.device("cpu"), [1.0], [1.0], clock=clock), make_state(), {}
    speed.start(state)
    advance(speed, clock, state, 3.0, 100, None)
    advance(speed, clock, state, 1.0, 100, record)
    assert record["perf/step_seconds"] == pytest.approx(2.0)
    assert record["perf/tokens_per_second"] == pytest.approx(50.0)
    advance(speed, clock, state, 0.5, 100, record)
    assert record["perf/tokens_per_second"] == pytest.approx(200.0)


def test_evaluation_and_checkpoints_are_left_out(make_state, clock: Clock) -> None:
    speed, state, record = Speed(torch.device("cpu"), [1.0], [1.0], clock=clock), make_state(), {}
    speed.start(state)
    advance(speed, clock, state, 1.0, 100, None)
    clock.now += 50
    speed.evaluated(state, {})
    clock.now += 70
    speed.saving(state)
    advance(speed, clock, state, 1.0, 100, record)
    assert record["perf/step_seconds"] == pytest.approx(1.0)


def test_a_resumed_run_counts_only_its_own_tokens(make_state, clock: Clock) -> None:
    speed, state, record = Speed(torch.device("cpu"), [1.0], [1.0], clock=clock), make_state(step=50, tokens=5000), {}
    speed.start(state)
    advance(speed, clock, state, 2.0, 100, record)
    assert record["perf/tokens_per_second"] == pytest.approx(50.0)


def test_mfu_only_where_the_peak_is_known(make_state, clock: Clock) -> None:
    speed, state, record = Speed(torch.device("cpu"), [6e9, 1e9], [9e9, 2e9], clock=clock), make_state(world_size=2), {}
    speed.start(state)
    advance(speed, clock, state, 1.0, 1000, record)
    assert "perf/mfu" not in record and record["perf/peak_memory_bytes"] > 0
    speed.peak = 1e13
    advance(speed, clock, state, 1.0, 1000, record)
    assert record["perf/mfu"] == pytest.approx(0.3) and record["perf/mfu_dense_equivalent"] == pytest.approx(0.45)
    state.phase = 1
    advance(speed, clock, state, 1.0, 1000, record)
    assert record["perf/mfu"] == pytest.approx(0.05) and record["perf/mfu_dense_equivalent"] == pytest.approx(0.1)
