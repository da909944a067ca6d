"""When a run is evaluated and saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from sieve.train.callbacks.callback import Callback, Callbacks
from sieve.train.callbacks.checkpoint import Checkpoint, CheckpointConfig, SaveFailed
from sieve.train.callbacks.evaluate import EvalConfig, Evaluate
from sieve.train.saver import Done


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def evaluated(self, run, record) -> None:
        self.seen.append(("evaluated", run.step, record))

    def saved(self, run, done) -> None:
        self.seen.append(("saved", done.step, done.path, run.step))


class FakeSaver:
    """Needs `takes` looks until a save is on the disk; those of the steps in `broken` fail."""

    def __init__(self, takes: int = 1, broken: tuple[int, ...] = ()) -> None:
        self.takes, self.broken = takes, broken
        self.pending, self.closed, self.patience = False, False, []

    def prepare(self) -> None:
        pass

    def begin(self, run) -> None:
        assert not self.pending
        self.pending, self.left, self.step = True, self.takes, run.step

    def poll(self) -> Done | None:
        self.left -= 1
        if self.left > 0:
            return None
        self.pending = False
        bad = self.step in self.broken
        return Done(self.step, None if bad else Path(f"step-{self.step}"), "no space" if bad else None, 1, 0.0, 0.0)

    def wait(self, patience=None, alive=None) -> Done | None:
        self.patience.append(patience)
        if patience is not None and self.left > 3:
            return None
        self.left = 0
        return self.poll()

    def close(self) -> None:
        self.closed = True


def drive(
    make_state, *, every_eval: int, every_save: int, total: int, start: int = 0, stop: int | None = None,
    saver: FakeSaver | None = None, asked: int | None = None, cut: bool = False, **state,
):
    """The steps at which a run is evaluated and saved, in order."""
    run = make_state(
        step=start, total_steps=total, stopping=False, ending=False, save_requested=False,
        **({"evaluated_step": 0} | state),
    )
    recorder = Recorder()
    callbacks = Callbacks([
        Evaluate(EvalConfig(every=every_eval), lambda run, alive: None if cut else {"eval/loss": 1.5}, recorder),
        Checkpoint(CheckpointConfig(every=every_save), saver or FakeSaver(), recorder),
    ])
    callbacks.start(run)
    while run.step < total and not run.stopping:
        run.step += 1
        run.tokens = 10 * run.step
        run.stopping = run.ending = run.step == stop
        run.save_requested = run.step == asked
        callbacks.step(run, None)
    return [event[:2] for event in recorder.seen], recorder.seen, run


def test_every_so_many_steps_and_at_the_end(make_state):
    events, seen, run = drive(make_state, every_eval=3, every_save=2, total=7)
    assert events == [
        ("evaluated", 3), ("saved", 2), ("saved", 4), ("evaluated", 6), ("evaluated", 7), ("saved", 6), ("saved", 7),
    ]
    assert seen[0][2] == {"step": 3, "tokens": 30, "eval/loss": 1.5} and seen[1][2] == Path("step-2")
    assert seen[1][3] == 3, "the step after a save begins before it is on the disk"
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


def test_a_save_that_is_asked_for(make_state):
    assert drive(make_state, every_eval=0, every_save=0, total=5, asked=2)[0] == [("saved", 2), ("saved", 5)]


def test_an_evaluation_that_is_cut_short_stops_the_run(make_state):
    events, _, run = drive(make_state, every_eval=3, every_save=10, total=9, cut=True)
    assert run.step == 3 and run.stopping and run.evaluated_step == 0 and events == []


def test_a_slow_save_is_waited_for_and_then_the_next_is_left_out(make_state, caplog):
    saver = FakeSaver(takes=3)
    assert drive(make_state, every_eval=0, every_save=2, total=6, saver=saver)[0] == [
        ("saved", 2), ("saved", 4), ("saved", 6),
    ]
    assert saver.patience == [300.0, None, None]
    saver = FakeSaver(takes=99)
    assert drive(make_state, every_eval=0, every_save=2, total=6, saver=saver)[0] == [("saved", 2), ("saved", 6)]
    assert "no checkpoint is made of step 4: the one before is still being written after 300 s" in caplog.text


def test_a_save_that_fails_is_told_of_and_training_goes_on_but_not_at_the_end(make_state, caplog):
    assert drive(make_state, every_eval=0, every_save=2, total=6, saver=FakeSaver(broken=(2, 4)))[0] == [("saved", 6)]
    assert "the checkpoint of step 2 could not be written: no space; training goes on" in caplog.text
    with pytest.raises(SaveFailed, match="the state of step 6 could not be saved: no space"):
        drive(make_state, every_eval=0, every_save=2, total=6, saver=FakeSaver(broken=(6,)))


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
