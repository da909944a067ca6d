"""A copy that is still on its way when training goes on has the moment's values, on a GPU and on a stand-in for one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from sieve.train.callbacks.checkpoint import CheckpointConfig
from sieve.train.distributed import Place
from sieve.train.hostcopy import DirectCopier, HostCopy, StreamCopier
from sieve.train.overrides import load_config
from sieve.train.partition import Piece
from sieve.train.saver import Saver
from sieve.train.shards import ShardReader
from sieve.train.state import RunState


class LateCopier(DirectCopier):
    """Like a slow stream: what may wait is copied when it has to be, not before. calls: what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._late, self._there = [], threading.Event()

    def copy(self, now, later) -> None:
        self.calls.append("copy")
        super().copy(now, [])
        self._late = list(later)
        self._there.clear()

    def fence(self) -> None:
        self.calls.append("fence")
        self._flush()

    def wait(self) -> None:
        self.calls.append("wait")
        if not self._there.wait(20):
            raise TimeoutError("nobody has called fence()")

    def _flush(self) -> None:
        super().copy(self._late, [])
        self._late = []
        self._there.set()


@pytest.fixture
def run(tmp_path: Path) -> RunState:
    config = load_config([f"runs_dir={tmp_path}", "name=run"])
    return RunState(config, config.directory, 0, 1, 100, {}, data={"tokens": 5})


def check_saved(path: Path, expected: dict[str, torch.Tensor], steps: int) -> None:
    reader = ShardReader(path)
    for key, value in expected.items():
        kind, name = key.split(":")
        assert torch.equal(reader.read(kind, name, 0, value.numel()), value), key
        assert reader.step(name) == steps


def state_of(engine) -> dict[str, torch.Tensor]:
    return {f"{kind}:{p.name}": t.clone() for p in engine.pieces() for kind, t in p.tensors.items()}


def test_a_step_begins_before_the_copy_and_updates_after_it(run, plain_engine):
    engine, copier = plain_engine(), LateCopier()
    saver = Saver(CheckpointConfig(), engine, Place(0, 1, 0, torch.device("cpu")), copier)
    for step in (2, 4):
        engine.train(2)
        expected, mean = state_of(engine), engine.module[1].running_mean.clone()
        run.step = step
        copier.calls.clear()
        saver.begin(run)
        assert "fence" not in copier.calls and saver.poll() is None and saver.pending
        engine.train(1)  # changes a buffer in its forward, and the rest behind the fence
        path = saver.wait(20).path
        check_saved(path, expected, step // 2 * 3 - 1)
        assert torch.equal(ShardReader(path).buffer("1.running_mean"), mean)
        assert not torch.equal(state_of(engine)["weight:0.weight"], expected["weight:0.weight"])
    saver.close()


def test_without_the_fence_another_moment_would_be_saved(run, plain_engine):
    """That is, the test above can fail."""
    engine, copier = plain_engine(), LateCopier()
    saver = Saver(CheckpointConfig(), engine, Place(0, 1, 0, torch.device("cpu")), copier)
    engine.before_update = lambda: None
    engine.train(1)
    expected = state_of(engine)
    saver.begin(run)
    engine.train(1)
    copier.fence()
    with pytest.raises(AssertionError, match="weight:0.weight"):
        check_saved(saver.wait(20).path, expected, 1)
    saver.close()


def piece_of(values: torch.Tensor) -> Piece:
    return Piece("p", 0, values.numel(), {"weight": values}, torch.tensor(1.0, device=values.device))


def test_a_second_copy_takes_the_same_memory():
    copy, piece = HostCopy(), piece_of(torch.zeros(4))
    copy.take([piece], {})
    first = copy._tensors["weight:p:0"].data_ptr()
    piece.tensors["weight"].fill_(3)
    assert copy._tensors["weight:p:0"].sum() == 0, "a copy, not a view"
    copy.take([piece], {})
    assert copy._tensors["weight:p:0"].data_ptr() == first and copy._tensors["weight:p:0"].sum() == 12


@pytest.mark.gpu
@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_a_gpus_copy_runs_beside_the_step_and_before_the_update(tmp_path, device):
    """The stream is held up, so that whoever does not wait for it is found out."""
    cuda = torch.device("cuda", device)
    torch.cuda.set_device(cuda)
    values, copier = torch.arange(1e7, device=cuda), StreamCopier(cuda)
    copy, piece, buffer = HostCopy(copier), piece_of(values), torch.ones(3, device=cuda)
    copy.reserve([piece], {"b": buffer})
    assert all(t.is_pinned() for t in copy._tensors.values())
    for round_ in range(3):
        expected = values.cpu()
        torch.cuda._sleep(200_000_000)  # the step before it is not through yet, and changes the values at its end
        values += 1
        expected += 1
        with torch.cuda.stream(copier._stream):
            torch.cuda._sleep(200_000_000)
        copy.take([piece], {"b": buffer})
        assert not copier._copied.query(), "the host has waited for the copy"
        buffer += 1  # may be changed at once
        copy.fence()
        values.mul_(3)
        copy.write(tmp_path / "rank-00000.safetensors")
        reader = ShardReader(tmp_path)
        assert torch.equal(reader.read("weight", "p", 0, values.numel()), expected)
        assert torch.equal(reader.buffer("b"), torch.full((3,), 1.0 + round_)) and reader.step("p") == 1
        assert torch.equal(values.cpu(), 3 * expected)


@pytest.mark.gpu
def test_the_thread_of_a_saver_is_on_its_ranks_device(plain_engine):
    last = torch.cuda.device_count() - 1
    saver = Saver(CheckpointConfig(), plain_engine(), Place(0, 1, last, torch.device("cuda", last)))
    assert saver._thread.submit(torch.cuda.current_device).result() == last
    saver.close()
