"""What the kernel tests share: the device they run on, poisoned memory, the naive loop, and random packed inputs."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sieve.kernels.nsa.layout import Packing


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def poison(monkeypatch):
    """Memory from torch.empty and its kin is NaN or the largest integer, so that whatever a kernel leaves out shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            with torch.no_grad():  # it may be a leaf
                return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def naive():
    """The module naive.py, which importmode=importlib cannot import by name."""
    spec = importlib.util.spec_from_file_location("naive", Path(__file__).with_name("nsa") / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed():
    """packed(lengths) -> Packing."""

    def make(lengths, device="cpu"):
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        return Packing.of(cu, sum(lengths), max(lengths))

    return make


@pytest.fixture
def nsa_inputs(packed):
    """nsa_inputs(lengths, geometry, ...) -> tensors (the operator's, in order), packing, scale, cotangent."""

    def make(lengths, geometry, heads=4, kv_heads=2, dim_qk=6, dim_v=4, dtype=torch.float64, std=1.0, seed=0):
        rng = torch.Generator().manual_seed(seed)
        T = sum(lengths)
        C = T // geometry.kernel_stride

        def leaf(*shape):
            return (std * torch.randn(*shape, dtype=torch.float64, generator=rng)).to(dtype).requires_grad_()

        tensors = [leaf(T, heads, dim_qk)]
        for n in (C, T, T):
            tensors += [leaf(n, kv_heads, dim_qk), leaf(n, kv_heads, dim_v)]
        gates = torch.rand(T, heads, 3, dtype=torch.float64, generator=rng).to(dtype).requires_grad_()
        cotangent = torch.randn(T, heads, dim_v, dtype=torch.float64, generator=rng).to(dtype)
        return SimpleNamespace(
            tensors=[*tensors, gates], packing=packed(lengths), scale=dim_qk**-0.5, cotangent=cotangent
        )

    return make
