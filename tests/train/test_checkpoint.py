from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sieve.train import checkpoint
from sieve.train.checkpoint import Saved, check_fits, checkpoints, find, tidy
from sieve.train.overrides import load_config
from sieve.train.state import RunState, random_state, set_random_state


class FakeEngine:
    """Writes a file, or dies halfway."""

    def __init__(self, die: bool = False) -> None:
        self.die = die

    def save(self, directory: Path) -> None:
        (directory / "weights.pt").write_bytes(b"weights")
        if self.die:
            raise OSError("the disk is full")


@pytest.fixture
def run(tmp_path: Path) -> RunState:
    config = load_config([f"runs_dir={tmp_path}", "name=run"])
    return RunState(config, config.directory, 0, 1, 100, {}, data={"tokens": 5}, wandb_id="abc")


def save_at(run: RunState, *steps: int, keep: int = 9) -> None:
    for step in steps:
        run.step, run.tokens = step, 10 * step
        checkpoint.save(run, FakeEngine(), keep)


def test_a_checkpoint_holds_what_a_run_needs(run):
    save_at(run, 3)
    (saved,) = [Saved.read(path) for path in checkpoints(run.directory).values()]
    assert saved.path.name == "step-00000003" and saved.step == 3
    assert {p.name for p in saved.path.iterdir()} == {"weights.pt", "rank-00000.pt", "manifest.json"}
    wanted = {"format": 1, "tokens": 30, "world_size": 1, "wandb_id": "abc", "data": {"tokens": 5}, "evaluated_step": 0}
    assert saved.manifest.items() >= wanted.items() and saved.manifest["config"] == run.config.dump()


def test_the_newest_stay(run):
    save_at(run, 1, 2, 3, 10, keep=2)
    assert list(checkpoints(run.directory)) == [3, 10]
    assert {p.name for p in (run.directory / "checkpoints").iterdir()} == {"step-00000003", "step-00000010"}


def test_a_save_that_dies_leaves_the_last_one_and_nothing_else(run):
    save_at(run, 1)
    run.step = 2
    with pytest.raises(OSError, match="disk is full"):
        checkpoint.save(run, FakeEngine(die=True), 1)
    assert find(run.directory, "auto").step == 1
    tidy(run.directory, find(run.directory, "auto"))
    assert [p.name for p in (run.directory / "checkpoints").iterdir()] == ["step-00000001"]
    save_at(run, 2)
    assert list(checkpoints(run.directory)) == [1, 2]


def test_a_folder_without_a_manifest_is_no_checkpoint(run):
    save_at(run, 1, 2)
    (run.directory / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert find(run.directory, "auto").step == 1
    with pytest.raises(ValueError, match="resume=2: .* has no checkpoint of that step; it has 1"):
        find(run.directory, "2")


def test_what_resume_means(run):
    assert find(run.directory, "auto") is None and find(run.directory, "never") is None
    save_at(run, 1, 12)
    assert find(run.directory, "never") is None
    assert find(run.directory, "auto").step == 12 and find(run.directory, "1").step == 1
    assert find(Path("elsewhere"), str(run.directory / "checkpoints" / "step-00000001")).step == 1
    with pytest.raises(ValueError, match="give auto, never, a step, or a checkpoint's folder"):
        find(run.directory, "nowhere")


def test_another_format_is_refused(run):
    save_at(run, 1)
    manifest = run.directory / "checkpoints" / "step-00000001" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="checkpoint format 99; this version reads 1"):
        find(run.directory, "auto")


@pytest.mark.parametrize(("changes", "named"), [
    (["attention.topk=8"], ["attention.topk=8 (was 16)"]),
    (["seq_len=2048", "global_batch=16"], ["seq_len=2048 (was 1024)", "global_batch=16 (was 8)"]),
    (["attention=full"], ["attention.type=full (was nsa)"]),
    (["model.moe=null"], ["model.moe.num_experts=null (was 8)"]),
    (["zero=2"], ["zero.stage=2 (was 1)"]),
    (["dtype=bf16"], ["dtype=bf16 (was fp32)"]),
    (["tokenizer=bpe32k"], ["tokenizer.vocab_size=32768 (was 4096)"]),
    (["optim.clip=2", "schedule=cosine", "seed=1"], ["optim.clip=2 (was 1)", "schedule.type=cosine", "seed=1"]),
])
def test_a_run_with_other_settings_does_not_fit(run, changes, named):
    save_at(run, 1)
    with pytest.raises(ValueError) as error:
        check_fits(find(run.directory, "auto"), load_config(changes), 1)
    for text in named:
        assert text in str(error.value)
    assert "start another run with name=..., or resume=never" in str(error.value)


def test_settings_that_do_not_matter_may_change(run):
    save_at(run, 1)
    config = load_config([
        "name=other", "steps=7", "micro_batch=2", "log.every=1", "eval=none", "checkpoint.keep=5", "attention.impl=reference",
        "loss.chunk_size=7", "data.threads=1", "activation_checkpointing=block", "logger=none", "model.name=x",
    ])
    check_fits(find(run.directory, "auto"), config, 1)
    with pytest.raises(ValueError, match="saved by 1 processes and can only be loaded by as many; now there are 4"):
        check_fits(find(run.directory, "auto"), config, 4)


def test_nothing_complete_is_lost_when_a_run_begins_elsewhere(run):
    save_at(run, 1, 2, 3)
    tidy(run.directory, find(run.directory, "2"))
    folder = run.directory / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"step-00000001", "step-00000002", "superseded-step-00000003"}
    tidy(run.directory, None)
    assert not run.directory.exists() and (run.directory.with_name("run.1") / "checkpoints").is_dir()
    save_at(run, 1)
    tidy(run.directory, None)
    assert run.directory.with_name("run.2").is_dir()


def test_the_state_of_a_fork_does_not_take_over_the_wandb_run(run, monkeypatch):
    save_at(run, 4)
    saved = find(run.directory, "auto")
    engine = SimpleNamespace(load=lambda path: None)
    for directory, expected in ((run.directory, "abc"), (run.directory.with_name("fork"), None)):
        again = RunState(run.config, directory, 0, 1, 100, {})
        checkpoint.restore(saved, again, engine)
        assert (again.step, again.resumed_from, again.tokens, again.data) == (4, 4, 40, {"tokens": 5})
        assert again.wandb_id == expected


def test_every_random_generator_goes_on(tmp_path):
    def draws() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)]

    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    assert draws() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected
