"""When a run is evaluated and saved."""

from __future__ import annotations

from pathlib import Path

from sieve.train.callbacks.callback import Callback, Callbacks
from sieve.train.callbacks.checkpoint import Checkpoint, CheckpointConfig
from sieve.train.callbacks.evaluate import EvalConfig, Evaluate


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def evaluated(self, run, record) -> None:
        self.seen.append(("evaluated", run.step, record))

    def saved(self, run, path) -> None:
        self.seen.append(("saved", run.step, path))


def drive(make_state, *, every_eval: int, every_save: int, total: int, start: int = 0, stop: int | None = None, **state):
    """The steps at which a run is evaluated and saved, in order."""
    run = make_state(step=start, total_steps=total, stopping=False, **({"evaluated_step": 0} | state))
    recorder = Recorder()
    callbacks = Callbacks([
        Evaluate(EvalConfig(every=every_eval), lambda run: {"eval/loss": 1.5}, recorder),
        Checkpoint(CheckpointConfig(every=every_save), lambda run: Path(f"step-{run.step}"), recorder),
    ])
    callbacks.start(run)
    while run.step < total and not run.stopping:
        run.step += 1
        run.tokens = 10 * run.step
        run.stopping = run.step == stop
        callbacks.step(run, None)
    return [event[:2] for event in recorder.seen], recorder.seen, run


def test_every_so_many_steps_and_at_the_end(make_state):
    events, seen, run = drive(make_state, every_eval=3, every_save=2, total=7)
    assert events == [
        ("saved", 2), ("evaluated", 3), ("saved", 4), ("evaluated", 6), ("saved", 6), ("evaluated", 7), ("saved", 7),
    ]
    assert seen[1][2] == {"step": 3, "tokens": 30, "eval/loss": 1.5} and seen[0][2] == Path("step-2")
    assert run.evaluated_step == 7


def test_zero_means_never_and_only_at_the_end(make_state):
    assert drive(make_state, every_eval=0, every_save=0, total=5)[0] == [("saved", 5)]


def test_a_stop_saves_at_once_and_the_evaluation_is_made_up_for(make_state):
    events, _, run = drive(make_state, every_eval=3, every_save=10, total=9, stop=6)
    assert events == [("evaluated", 3), ("saved", 6)]
    events, _, _ = drive(make_state, every_eval=3, every_save=10, total=9, start=6, evaluated_step=run.evaluated_step)
    assert events == [("evaluated", 6), ("evaluated", 9), ("saved", 9)]


def test_what_was_evaluated_before_the_stop_is_not_evaluated_again(make_state):
    assert drive(make_state, every_eval=3, every_save=10, total=9, start=6, evaluated_step=6)[0][0] == ("evaluated", 9)
    assert drive(make_state, every_eval=3, every_save=10, total=5, start=4)[0] == [("evaluated", 5), ("saved", 5)]


def test_several_callbacks_are_called_in_order():
    called = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def start(self, run) -> None:
            called.append((self.name, "start"))

        def end(self, run, status) -> None:
            called.append((self.name, status))

    both = Callbacks([Named("a"), Callbacks([Named("b")])])
    both.start(None)
    both.step(None, None)
    both.end(None, "finished")
    assert called == [("a", "start"), ("b", "start"), ("a", "finished"), ("b", "finished")]
