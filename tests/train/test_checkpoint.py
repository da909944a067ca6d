"""Which checkpoints are found, which are whole, and what may go on from them."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sieve.train import checkpoint
from sieve.train.checkpoint import Saved, check_fits, damage, tidy
from sieve.train.distributed import Place
from sieve.train.overrides import load_config
from sieve.train.state import RunState, random_state, set_random_state

FILES = ("rank-00000.safetensors", "rank-00000.pt", "manifest.json", "COMPLETE")


@pytest.fixture
def run(tmp_path: Path) -> RunState:
    config = load_config([f"runs_dir={tmp_path}", "name=run"])
    return RunState(config, config.directory, 0, 1, 100, {}, data={"tokens": 5, "hash": "ab"}, wandb_id="abc")


def find(directory: Path, resume: str) -> Saved | None:
    return checkpoint.find(directory, resume, Place(0, 1, 0, torch.device("cpu")))


def path_of(run: RunState, step: int) -> Path:
    return run.directory / "checkpoints" / f"step-{step:08d}"


def test_a_checkpoint_holds_what_a_run_needs(run, save_at):
    run.guard = {"skipped": 3}
    save_at(run, 3)
    saved = find(run.directory, "auto")
    assert saved.path.name == "step-00000003" and saved.step == 3
    assert {p.name for p in saved.path.iterdir()} == set(FILES)
    wanted = {
        "format": 2, "tokens": 30, "tokens_hash": "ab", "world_size": 1, "zero_stage": 1, "wandb_id": "abc",
        "data": {"tokens": 5, "hash": "ab"}, "evaluated_step": 0, "guard": {"skipped": 3},
    }
    assert saved.manifest.items() >= wanted.items() and saved.manifest["config"] == run.config.dump()
    assert saved.manifest["parameters"]["0.weight"] == [16, 8]


def test_everybody_can_check_the_sums(run, save_at):
    save_at(run, 3)
    done = subprocess.run(["sha256sum", "--check", "COMPLETE"], cwd=path_of(run, 3), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_a_damaged_file_is_noticed_wherever_it_is(run, save_at, name, harm):
    save_at(run, 1, 2)
    path = path_of(run, 2) / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    kept = {"flip": data, "cut": data[:-1], "empty": b"", "remove": b""}[harm]
    path.write_bytes(kept)
    if harm == "remove":
        path.unlink()
    if harm == "cut" and name == "COMPLETE":  # its last newline says nothing
        path.write_bytes(data[:-2])
    assert find(run.directory, "auto").step == 1
    with pytest.raises(ValueError, match=r"resume=2: .*step-00000002 cannot be resumed from: .*" + name):
        find(run.directory, "2")


def test_every_single_byte_counts(run, save_at):
    """Each byte of the three small files and some of the large one, flipped by turns: never taken for whole."""
    save_at(run, 1)
    folder, generator = path_of(run, 1), random.Random(0)
    for name in FILES:
        data = (folder / name).read_bytes()
        places = range(len(data)) if name == "COMPLETE" else generator.sample(range(len(data)), 40)
        for place in places:
            harmed = bytearray(data)
            harmed[place] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(harmed)
            whole = damage(folder) is None
            # Another kind of newline in the list changes nothing that it says.
            assert not whole or name == "COMPLETE" and data[place : place + 1] == b"\n", (name, place)
        (folder / name).write_bytes(data)
    assert damage(folder) is None


def test_what_is_passed_over_is_told(run, save_at, caplog):
    save_at(run, 1, 2, 3)
    (path_of(run, 3) / "COMPLETE").unlink()
    (path_of(run, 2) / "rank-00000.safetensors").write_bytes(b"no")
    assert find(run.directory, "auto").step == 1
    told = [record.getMessage() for record in caplog.records]
    assert "step-00000003: is no complete checkpoint: it has no file COMPLETE" in told[0]
    assert "step-00000002: rank-00000.safetensors is damaged: its sha256 " in told[1]


def test_a_run_of_which_nothing_is_whole_is_not_begun_anew_in_silence(run, save_at):
    save_at(run, 1)
    (path_of(run, 1) / "rank-00000.pt").unlink()
    with pytest.raises(ValueError, match="no checkpoint of .* is whole .*rank-00000.pt: No such file.* resume=never"):
        find(run.directory, "auto")
    assert find(run.directory, "never") is None


def test_what_resume_means(run, save_at):
    assert find(run.directory, "auto") is None and find(run.directory, "never") is None
    save_at(run, 1, 12)
    assert find(run.directory, "never") is None
    assert find(run.directory, "auto").step == 12 and find(run.directory, "1").step == 1
    assert find(Path("elsewhere"), str(path_of(run, 1))).step == 1
    with pytest.raises(ValueError, match="resume=2: .* has no checkpoint of that step; it has 1, 12"):
        find(run.directory, "2")
    with pytest.raises(ValueError, match="give auto, never, a step, or a checkpoint's folder"):
        find(run.directory, "nowhere")


def test_another_format_is_refused(run, save_at):
    save_at(run, 1)
    manifest = path_of(run, 1) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="checkpoint format 99; this version reads 2"):
        find(run.directory, "auto")
    (path_of(run, 1) / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="of format 1, of an earlier version"):
        find(run.directory, "auto")


@pytest.mark.parametrize(("changes", "named"), [
    (["attention.topk=8"], ["attention.topk=8 (was 16)"]),
    (["seq_len=2048", "global_batch=16"], ["seq_len=2048 (was 1024)", "global_batch=16 (was 8)"]),
    (["attention=full"], ["attention.type=full (was nsa)"]),
    (["model.moe=null"], ["model.moe.num_experts=null (was 8)"]),
    (["dtype=bf16"], ["dtype=bf16 (was fp32)"]),
    (["tokenizer=bpe32k"], ["tokenizer.vocab_size=32768 (was 4096)"]),
    (["init=llama"], ["init=llama (was null)"]),
    (["optim.clip=2", "schedule=cosine", "seed=1"], ["optim.clip=2 (was 1)", "schedule.type=cosine", "seed=1"]),
])
def test_a_run_with_other_settings_does_not_fit(run, save_at, caplog, changes, named):
    save_at(run, 1)
    with pytest.raises(ValueError) as error:
        check_fits(find(run.directory, "auto"), load_config(changes))
    check_fits(find(run.directory, "auto"), load_config(changes), "allow")
    for text in named:
        assert text in str(error.value) and text in caplog.text
    assert "start another run with name=..., or resume=never; resume_mismatch=allow" in str(error.value)


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_file_where_the_folder_is_to_be(run, where):
    (run.directory / where).parent.mkdir(parents=True, exist_ok=True)
    (run.directory / where).write_text("")
    with pytest.raises(ValueError, match="is a file, where the run's folder is to be; move it, or choose another name="):
        find(run.directory, "auto")


def test_settings_that_do_not_matter_may_change(run, save_at):
    save_at(run, 1)
    config = load_config([
        "name=other", "steps=7", "micro_batch=2", "log.every=1", "eval=none", "checkpoint.keep=5", "attention.impl=reference",
        "loss.chunk_size=7", "data.threads=1", "activation_checkpointing=block", "logger=none", "model.name=x",
        "zero=3",
    ])
    check_fits(find(run.directory, "auto"), config)


def test_nothing_complete_is_lost_when_a_run_begins_elsewhere(run, save_at):
    save_at(run, 1, 2, 3)
    tidy(run.directory, find(run.directory, "2"))
    folder = run.directory / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"step-00000001", "step-00000002", "superseded-step-00000003"}
    tidy(run.directory, None)
    assert not run.directory.exists() and (run.directory.with_name("run.1") / "checkpoints").is_dir()
    save_at(run, 1)
    tidy(run.directory, None)
    assert run.directory.with_name("run.2").is_dir()


def test_a_fork_has_the_state_but_not_the_wandb_run(run, save_at, plain_engine):
    engine = plain_engine()
    engine.train(3)
    save_at(run, 4, engine=engine)
    saved = find(run.directory, "auto")
    for directory, expected in ((run.directory, "abc"), (run.directory.with_name("fork"), None)):
        again, other = RunState(run.config, directory, 0, 1, 100, {}), plain_engine(seed=1)
        checkpoint.restore(saved, again, other)
        assert (again.step, again.resumed_from, again.tokens, again.data) == (4, 4, 40, {"tokens": 5, "hash": "ab"})
        assert again.wandb_id == expected
        for ours, theirs in zip(other.module.state_dict().values(), engine.module.state_dict().values()):
            assert torch.equal(ours, theirs)
        for piece, source in zip(other.pieces(), engine.pieces()):
            assert piece.step == source.step == 3 and piece.tensors.keys() == {"weight", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(piece.tensors[kind], source.tensors[kind]) for kind in piece.tensors)


def test_another_model_is_refused_by_name(run, save_at, plain_engine):
    save_at(run, 4)
    with pytest.raises(ValueError, match=r"holds another model: 0.bias \[16\] \(the model: \[8\]\), 0.weight"):
        checkpoint.restore(find(run.directory, "auto"), run, plain_engine(width=4))


def test_ranks_that_were_not_there_have_generators_of_their_own(run, save_at, plain_engine):
    save_at(run, 4)
    draws = []
    for rank in (0, 1, 2, 2):
        again = RunState(run.config, run.directory, rank, 3, 100, {})
        checkpoint.restore(find(run.directory, "auto"), again, plain_engine())
        draws.append(torch.rand(()).item())
    assert len(set(draws)) == 3 and draws[2] == draws[3]


def test_every_random_generator_goes_on(tmp_path):
    def draws() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)]

    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    assert draws() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected
