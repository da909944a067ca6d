from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sieve.train.tensorfile import sha256_of, write_tensors


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3), "d": torch.zeros(0, 2),
        "e": torch.randn(4, 6).t(), "f": torch.tensor([True, False]), "g": torch.randn(5_000_000),
    }
    layout = {name: (t.dtype, list(t.shape)) for name, t in tensors.items()}
    size, digest = write_tensors(tmp_path / "x", layout, tensors.__getitem__, {"format": "pt"})
    assert size == (tmp_path / "x").stat().st_size
    assert digest == sha256_of(tmp_path / "x") == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_slice("g")[100:200], tensors["g"][100:200])


def test_a_tensor_of_another_shape_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a has shape \[2\] instead of \[3\]"):
        write_tensors(tmp_path / "x", {"a": (torch.float32, [3])}, lambda name: torch.zeros(2))
