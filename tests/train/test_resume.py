"""A run that is stopped and goes on has the losses, to the bit, of a run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sieve.train import loop
from sieve.train.checkpoint import checkpoints
from sieve.train.load import open_model
from sieve.train.overrides import load_config
from sieve.train.run import main, run

STEPS = 7


def rows(directory: Path) -> list[dict]:
    """The metrics, one row a step, without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "a step stands there twice"
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


class Crash(Exception):
    """Stands for kill -9 inside one process: nothing is saved."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training step `step` end in a Crash after the weights have changed, and after the checkpoint that is being
    written beside it is there."""
    original = loop.train_step

    def failing(run, *rest):
        record = original(run, *rest)
        if run.step == step:
            deadline = time.monotonic() + 60
            while not checkpoints(run.directory) and time.monotonic() < deadline:
                time.sleep(0.01)
            raise Crash
        return record

    monkeypatch.setattr(loop, "train_step", failing)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM during the training step `step`."""
    original = loop.train_step

    def signalled(run, *rest):
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, *rest)

    monkeypatch.setattr(loop, "train_step", signalled)


@pytest.mark.parametrize("settings", [
    ["attention=nsa"],
    ["attention=nsa", "dtype=bf16"],
    ["attention=full", "zero=0"],
    ["attention=full", "dtype=bf16", "zero=2"],
    ["attention=[full,nsa]", "dtype=bf16", "zero=3", "activation_checkpointing=block"],
], ids=" ".join)
def test_two_stops_change_nothing(settings, tiny_text, one_rank, tmp_path, monkeypatch):
    composed = load_config([*tiny_text, *settings, f"steps={STEPS}", f"runs_dir={tmp_path}"])

    def config(name: str):
        return composed.model_copy(update={"name": name})

    assert run(config("whole")) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 4)  # checkpoints are made at steps 2 and 4: this is just before the second
        with pytest.raises(Crash):
            run(config("stopped"))
    assert list(checkpoints(tmp_path / "stopped")) == [2]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # an evaluation is due at this step
        assert run(config("stopped")) == 0
    assert list(checkpoints(tmp_path / "stopped")) == [2, 3]
    assert run(config("stopped")) == 0
    whole, stopped = rows(tmp_path / "whole"), rows(tmp_path / "stopped")
    assert len(whole) == STEPS and whole == stopped
    assert len({row["train/loss"] for row in whole}) == STEPS and whole[-1]["train/loss"] < whole[0]["train/loss"]


def test_a_host_that_lags_behind_changes_nothing(tiny_text, one_rank, tmp_path, monkeypatch):
    """As on a GPU: steps that are not logged are judged one later. With a stop, a crash and a skipped step."""
    composed = load_config([
        *tiny_text, "attention=full", f"steps={STEPS}", f"runs_dir={tmp_path}", "log.every=3", "checkpoint.background=false",
    ])

    def bad_step(patch):
        original = loop.train_step

        def poisoned(run, engine, *rest):
            if run.step == 3:  # its loss is read after the step that follows
                forward = engine.forward

                def once(*args, **kwargs):
                    engine.forward = forward
                    out = forward(*args, **kwargs)
                    return out._replace(loss_sum=out.loss_sum * float("nan"), ce_sum=out.ce_sum * float("nan"))

                engine.forward = once
            return original(run, engine, *rest)

        patch.setattr(loop, "train_step", poisoned)

    bad_step(monkeypatch)
    assert run(composed.model_copy(update={"name": "whole"})) == 0
    ledger = loop.Ledger
    monkeypatch.setattr(loop, "Ledger", lambda guard, lag: ledger(guard, lag=True))
    lagging = composed.model_copy(update={"name": "lagging"})
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(Crash):
            run(lagging)
    assert list(checkpoints(tmp_path / "lagging")) == [2, 4]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run(lagging) == 0
    assert run(lagging) == 0
    assert rows(tmp_path / "lagging") == rows(tmp_path / "whole")
    assert rows(tmp_path / "whole")[-1]["train/skipped"] == 1
    found = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("lagging", "whole")]
    assert found[0] == found[1] and '"step": 4' in found[0]


def test_a_finished_run_says_so_and_can_be_made_longer(tiny_text, one_rank, tmp_path, capsys):
    command = [*tiny_text, f"runs_dir={tmp_path}", "name=run", "attention=full", "schedule.decay=0"]
    assert main([*command, "steps=3"]) == 0
    before = rows(tmp_path / "run")
    assert main([*command, "steps=3"]) == 0
    assert "is complete: step 3 of 3" in capsys.readouterr().err
    assert main([*command, "steps=2"]) == 0
    assert "is complete: step 3 is made, and 2 are asked for; more with steps=" in capsys.readouterr().err
    assert main([*command, "steps=5"]) == 0
    assert "learning rate" not in capsys.readouterr().err
    after = rows(tmp_path / "run")
    assert after[:3] == before and [row["step"] for row in after] == [1, 2, 3, 4, 5]


def test_other_settings_do_not_go_on_from_a_checkpoint(tiny_text, one_rank, tmp_path, capsys):
    command = [*tiny_text, f"runs_dir={tmp_path}", "name=run", "attention=full", "steps=2"]
    assert main(command) == 0
    assert main([*command, "steps=4", "seed=3", "optim.lr=0.5"]) == 2
    message = capsys.readouterr().err
    assert "optim.lr=0.5 (was 0.01)" in message and "seed=3 (was 0)" in message and "resume=never" in message
    assert "Traceback" not in message
    assert main([*command, "steps=4", "log.every=2", "data.threads=1"]) == 0
    said = "the learning rate had come down to 0.1 of its peak by step 2 of 2, and rises to 1 again with steps=4"
    assert said in capsys.readouterr().err


def test_text_that_has_moved_is_the_same_text(tiny_text, one_rank, tmp_path, capsys):
    (place,) = (Path(text.split("'")[1]) for text in tiny_text if text.startswith("data.paths="))
    settings = [text for text in tiny_text if not text.startswith("data.paths=")]
    command = [*settings, f"runs_dir={tmp_path}", "attention=full", "eval=none", "schedule.decay=0"]
    moved = tmp_path / "elsewhere"
    shutil.copytree(place, moved)

    def losses(name: str) -> list[float]:
        return [row["train/loss"] for row in rows(tmp_path / name)]

    assert main([*command, f"data.paths=['{place}']", "steps=4", "name=run"]) == 0
    assert main([*command, f"data.paths=['{place}']", "steps=6", "name=far"]) == 0
    assert main([*command, f"data.paths=['{moved}']", "steps=6", "name=run"]) == 0
    assert losses("run") == losses("far") and len(losses("run")) == 6
    (moved / "05.txt").write_text("another text altogether\n")
    assert main([*command, f"data.paths=['{moved}']", "steps=8", "name=run"]) == 2
    assert "the training text, its tokenizer or the mixture changed" in capsys.readouterr().err
    assert len(losses("run")) == 6


def test_another_validation_text_is_told(tiny_text, one_rank, tmp_path, capsys):
    texts = tmp_path / "validation"
    texts.mkdir()
    (texts / "a.txt").write_text("abc def " * 100)
    settings = [text for text in tiny_text if not text.startswith("data.validation_fraction")]
    command = [*settings, f"runs_dir={tmp_path}", "name=run", "attention=full", "schedule.decay=0"]
    assert main([*command, f"data.validation_paths=['{texts}']", "steps=2"]) == 0
    texts.rename(tmp_path / "moved")
    moved = f"data.validation_paths=['{tmp_path}/moved']"
    assert main([*command, moved, "steps=3"]) == 0
    (tmp_path / "moved" / "a.txt").write_text("abc deg " * 100)
    assert main([*command, moved, "steps=4"]) == 2
    assert "the validation text is not the one that losses until" in capsys.readouterr().err
    opened = open_model("run", str(tmp_path), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="the validation text of .* has changed since"):
        opened.validation()
    assert main([*command, moved, "steps=4", "resume_mismatch=allow"]) == 0
    assert "going on, as resume_mismatch=allow says" in capsys.readouterr().err


def test_a_run_is_not_put_aside_for_one_that_cannot_begin(tiny_text, one_rank, tmp_path, capsys):
    command = [*tiny_text, f"runs_dir={tmp_path}", "name=run", "attention=full", "steps=2", "resume=never"]
    assert main(command) == 0
    before = sorted(path.name for path in tmp_path.rglob("*"))
    config = (tmp_path / "run" / "config.yaml").read_text()
    for wrong in (f"data.paths=['{tmp_path}/nothing']", "seq_len=1000000", f"init={tmp_path}/nothing"):
        assert main([*command, wrong]) == 2, wrong
        assert sorted(path.name for path in tmp_path.rglob("*")) == before, wrong
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert "held another run" not in capsys.readouterr().err


def test_resume_by_step_never_and_path(tiny_text, one_rank, tmp_path, capsys):
    command = [*tiny_text, f"runs_dir={tmp_path}", "attention=full", "steps=5", "eval=none", "checkpoint.keep=9"]
    assert main([*command, "name=run"]) == 0
    whole = rows(tmp_path / "run")
    assert main([*command, "name=run", "resume=2"]) == 0
    assert rows(tmp_path / "run") == whole
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("superseded-*")} == {
        "superseded-step-00000004", "superseded-step-00000005",
    }
    assert main([*command, "name=run", "resume=3"]) == 2
    assert "resume=3: " in (message := capsys.readouterr().err) and "it has 2, 4, 5" in message

    source = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert main([*command, "name=fork", f"resume={source}"]) == 0
    assert rows(tmp_path / "fork") == whole[4:]
    assert main([*command, "name=fork", f"resume={tmp_path}/run"]) == 2
    assert f"did you mean {tmp_path}/run/checkpoints/step-00000005?" in capsys.readouterr().err

    assert main([*command, "name=run", "resume=never"]) == 0
    assert rows(tmp_path / "run") == whole == rows(tmp_path / "run.1")


@pytest.mark.slow
def test_kill_9_and_sigint_in_processes_of_their_own(tiny_text, tmp_path):
    def command(name: str) -> list[str]:
        return [
            sys.executable, "-m", "sieve.train", *tiny_text, "attention=nsa", "dtype=bf16", "steps=30",
            f"runs_dir={tmp_path}", f"name={name}",
        ]

    def interrupt(name: str, number: int, at: int) -> subprocess.Popen:
        metrics = tmp_path / name / "metrics.jsonl"
        process = subprocess.Popen(command(name), env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= at:
                process.send_signal(number)
                break
            time.sleep(0.01)
        return process

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), env=environment, check=True)
    assert interrupt("killed", signal.SIGKILL, 9).wait(300) == -signal.SIGKILL
    stopped = interrupt("killed", signal.SIGINT, 15)
    message = stopped.communicate(timeout=300)[1]
    assert stopped.returncode == 0 and "the same command goes on from there" in message
    assert len(rows(tmp_path / "killed")) < 30
    subprocess.run(command("killed"), env=environment, check=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
