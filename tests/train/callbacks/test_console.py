import io

from sieve.train.callbacks.console import Console, summary


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def train(console: Console, state, log_every: int = 5) -> None:
    console.start(state)
    for step in range(1, 21):
        state.step = step
        record = {"step": step, "train/loss": 2.0, "perf/tokens_per_second": 1234.0} if step % log_every == 0 else None
        console.step(state, record)
    console.evaluated(state, {"step": 20, "eval/loss": 2.25})
    console.end(state, "finished")


def test_without_a_terminal_a_plain_line_a_record(make_state) -> None:
    stream, seconds = io.StringIO(), iter(range(0, 1000, 3))
    train(Console(stream, clock=lambda: float(next(seconds))), make_state())
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("step ") for line in lines) == 5
    assert lines[1].startswith("step 5/20  loss 2.0000  1.23k tok/s  ETA ")
    assert "validation loss 2.2500" in stream.getvalue() and "finished at step 20/20" in lines[-1]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_the_eta_is_steps_left_times_seconds_a_step(make_state) -> None:
    stream, now = io.StringIO(), [0.0]
    console, state = Console(stream, clock=lambda: now[0]), make_state(step=10, resumed_from=10)
    console.start(state)
    now[0], state.step = 60.0, 12
    console.step(state, {"train/loss": 1.0})
    assert "ETA 4m00s" in stream.getvalue()  # 8 steps of 30 s: steps before the resume took no time of ours
    assert "resumed at step 10" in stream.getvalue()


def test_on_a_terminal_a_bar(make_state, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    train(Console(stream), make_state())
    text = stream.getvalue()
    assert "20/20" in text and "━" in text and "ETA" in text and "loss 2.0000" in text
    assert "validation loss 2.2500" in text


def test_other_ranks_are_silent(make_state) -> None:
    stream = io.StringIO()
    train(Console(stream), make_state(rank=1))
    assert stream.getvalue() == ""


def test_the_gap_to_a_baseline_of_other_tokens_is_doubted() -> None:
    assert summary({"train/loss": 3.0, "baseline/loss_gap": -0.01}) == "loss 3.0000  gap -0.0100"
    assert summary({"baseline/loss_gap": 0.5, "baseline/mismatch": 1}) == "gap +0.5000?"
