from __future__ import annotations

import pytest
import torch

from sieve.train.distributed import Place, any_rank, barrier, from_rank_0, sum_over_ranks

LAUNCHER = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_alone_without_a_launcher():
    assert Place.of("auto") == Place(0, 1, 0, torch.device("cpu"))


def test_as_the_launcher_says(monkeypatch):
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    assert Place.of("cpu") == Place(1, 2, 1, torch.device("cpu"))
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT; start with torchrun"):
        Place.of("cpu")


def test_devices(monkeypatch):
    with pytest.raises(ValueError, match="device=cuda, but torch finds no CUDA device; choose device=cpu or auto"):
        Place.of("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert Place.of("auto").device == Place.of("cuda").device == torch.device("cuda", 0)
    assert Place.of("cpu").device == torch.device("cpu")
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="LOCAL_RANK=1, but this machine has 1 CUDA devices"):
        Place.of("cuda")


def test_one_rank_needs_no_collective():
    assert sum_over_ranks(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert any_rank(True) and not any_rank(False)
    assert from_rank_0({"a": 1}) == {"a": 1}
    barrier()
