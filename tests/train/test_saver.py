"""Saves beside the training: what is written when, what is kept, and what becomes of a save that fails."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch

from sieve.train import saver as module
from sieve.train.callbacks.checkpoint import CheckpointConfig
from sieve.train.checkpoint import checkpoints, damage
from sieve.train.distributed import Place
from sieve.train.overrides import load_config
from sieve.train.saver import Saver
from sieve.train.shards import ShardReader
from sieve.train.state import RunState

ALONE = Place(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path) -> RunState:
    config = load_config([f"runs_dir={tmp_path}", "name=run"])
    return RunState(config, config.directory, 0, 1, 100, {}, data={"tokens": 5})


def names(run: RunState) -> list[str]:
    return sorted(path.name for path in (run.directory / "checkpoints").iterdir())


def test_the_newest_stay_and_every_so_many_for_good(run, save_at):
    save_at(run, 1, 2, 3, 10, keep=2)
    assert list(checkpoints(run.directory)) == [3, 10]
    save_at(run, 11, 12, 13, 14, keep=2, keep_every=4)
    assert names(run) == ["step-00000012", "step-00000013", "step-00000014"]
    save_at(run, 15, 16, keep=1, keep_every=4)
    assert list(checkpoints(run.directory)) == [12, 16]


def test_what_is_saved_is_the_moment_of_the_save(run, plain_engine):
    engine = plain_engine()
    engine.train()
    saver = Saver(CheckpointConfig(), engine, ALONE)
    expected = engine.module[0].weight.detach().clone().flatten()
    run.step, run.data = 1, {"tokens": 5}
    saver.begin(run)
    engine.train(3)  # goes on while the files are written
    run.step, run.data["tokens"] = 4, 99
    path = saver.wait().path
    assert path.name == "step-00000001" and json.loads((path / "manifest.json").read_text())["data"] == {"tokens": 5}
    assert torch.equal(ShardReader(path).read("weight", "0.weight", 0, 128), expected)
    assert not torch.equal(engine.module[0].weight.flatten(), expected)
    saver.close()


@pytest.mark.parametrize("prepared", [True, False])
def test_memory_may_be_got_before_the_first_save(run, plain_engine, prepared):
    engine, plain = plain_engine(), plain_engine()
    saver = Saver(CheckpointConfig(), engine, ALONE)
    if prepared:
        saver.prepare()
    for each in (engine, plain):
        torch.manual_seed(3)
        each.train(2)
    saver.begin(run)
    reader = ShardReader(saver.wait().path)
    for piece in plain.pieces():
        for kind, expected in piece.tensors.items():
            assert torch.equal(reader.read(kind, piece.name, piece.start, piece.stop), expected)
    saver.close()


def full_disk(monkeypatch, name: str, times: int) -> None:
    """`times` files of that name cannot be written."""
    left, original = [times], module.write_bytes

    def write(path: Path, data: bytes):
        if path.name == name and left[0]:
            left[0] -= 1
            path.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, data)

    monkeypatch.setattr(module, "write_bytes", write)


@pytest.mark.parametrize("name", ["rank-00000.pt", "manifest.json", "COMPLETE"])
def test_a_save_that_fails_leaves_the_last_one_and_nothing_else(run, save_at, monkeypatch, name):
    save_at(run, 1, keep=1)
    full_disk(monkeypatch, name, 1)
    done = save_at(run, 2, keep=1)
    assert done.path is None and "No space left on device (rank 0)" in done.problem and "are free in" in done.problem
    assert names(run) == ["step-00000001"] and damage(checkpoints(run.directory)[1]) is None
    assert save_at(run, 3, keep=1).path is not None
    assert names(run) == ["step-00000003"]


def test_after_a_failure_the_same_saver_goes_on(run, plain_engine, monkeypatch):
    full_disk(monkeypatch, "rank-00000.pt", 1)
    saver = Saver(CheckpointConfig(), plain_engine(), ALONE)
    saver.prepare()
    for run.step, good in ((1, False), (2, True)):
        saver.begin(run)
        assert (saver.wait().path is not None) is good
    saver.close()


def test_the_old_one_goes_only_when_the_new_one_is_there(run, save_at, monkeypatch):
    save_at(run, 1, keep=1)
    order, rename, discard = [], Path.rename, module.discard
    monkeypatch.setattr(Path, "rename", lambda self, to: order.append(("rename", Path(to).name)) or rename(self, to))
    monkeypatch.setattr(module, "discard", lambda path: order.append(("discard", path.name)) or discard(path))
    save_at(run, 2, keep=1)
    assert order.index(("rename", "step-00000002")) < order.index(("discard", "step-00000001"))


def test_an_error_that_is_no_disks_is_raised(run, save_at, monkeypatch):
    monkeypatch.setattr(module, "write_bytes", lambda path, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_at(run, 1)


def test_waiting_has_an_end(run, plain_engine, monkeypatch):
    original = module.write_bytes
    monkeypatch.setattr(module, "write_bytes", lambda path, data: time.sleep(0.4) or original(path, data))
    saver, looks = Saver(CheckpointConfig(), plain_engine(), ALONE), []
    saver.begin(run)
    assert saver.wait(0.05, lambda: looks.append(1)) is None and saver.pending and looks
    assert saver.wait().path is not None and not saver.pending
    saver.close()


@pytest.mark.slow
def test_the_stall_is_a_small_part_of_a_save(run, plain_engine):
    """150 million parameters, 1.8 GB with AdamW's moments, whose host memory is got before the first save."""
    engine = plain_engine()
    engine.module = torch.nn.ModuleList(torch.nn.Linear(3072, 2048, bias=False) for _ in range(24))
    engine.optimizer = type(engine.optimizer)(engine.module.parameters(), fused=False)
    saver = Saver(CheckpointConfig(keep=1), engine, ALONE)
    saver.prepare()
    saver._prepared.result()  # steps would have passed until the first save
    saves = []
    for step in range(1, 6):
        run.step = step
        saver.begin(run)
        saves.append(saver.wait())
    told = [f"{done.size / 1e9:.2f} GB: stall {done.stall:.2f} s of {done.seconds:.2f} s" for done in saves]
    print("; ".join(told))
    saver.close()
    assert sum(done.stall for done in saves) < 0.1 * sum(done.seconds for done in saves), told
