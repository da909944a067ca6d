"""The operator's front door: what it refuses, in which words, and what it chooses."""

import importlib.machinery
import logging
import subprocess
import sys
import types

import pytest
import torch

from sieve.kernels.common import log
from sieve.kernels.nsa import api, reference
from sieve.kernels.nsa.geometry import Geometry

GEOMETRY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=24)
NAMES = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"]
CPU = torch.device("cpu")


@pytest.fixture
def inputs(nsa_inputs):
    """Arguments by name."""
    made = nsa_inputs([20, 17], GEOMETRY, dtype=torch.float32)
    return dict(zip(NAMES, made.tensors)) | {"packing": made.packing, "geometry": GEOMETRY, "scale": made.scale}


@pytest.fixture
def fake_triton(monkeypatch):
    """A Triton module that records its calls."""
    module = types.ModuleType(api.TRITON_MODULE)
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    module.calls = []

    def nsa_attention(*args, scale, save_outputs):
        module.calls.append((args, scale, save_outputs))
        return reference.nsa_attention(*args, scale=scale)

    module.nsa_attention = nsa_attention
    monkeypatch.setitem(sys.modules, api.TRITON_MODULE, module)
    monkeypatch.setattr("sieve.kernels.nsa.triton_ops", module, raising=False)
    return module


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_the_implementations_agree(inputs, impl):
    want, blocks = reference.nsa_attention(**inputs)
    out, indices = api.nsa_attention(**inputs, impl=impl)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, blocks)


@pytest.mark.parametrize("name, shape, message", [
    ("q", (37, 24), r"q must be \[T, heads, head_dim\], got \[37, 24\]"),
    ("q", (37, 5, 6), r"q has 5 heads \[37, 5, 6\], not divisible by the 2 of v_slc"),
    ("q", (36, 4, 6), r"packing lays out 37 tokens, q \[36, 4, 6\] has 36"),
    ("k_cmp", (10, 2, 6), r"k_cmp must be \[9, 2, 6\] beside q \[37, 4, 6\], got \[10, 2, 6\]"),
    ("v_cmp", (9, 2, 6), r"v_cmp must be \[9, 2, 4\]"),
    ("k_slc", (37, 2, 4), r"k_slc must be \[37, 2, 6\]"),
    ("k_win", (37, 1, 6), r"k_win must be \[37, 2, 6\]"),
    ("v_win", (37, 2, 5), r"v_win must be \[37, 2, 4\]"),
    ("v_slc", (37, 8), r"v_slc must be \[T, heads, head_dim\]"),
    ("gates", (37, 4, 2), r"gates must be \[37, 4, 3\]"),
])
def test_shapes_that_do_not_fit(inputs, name, shape, message):
    with pytest.raises(ValueError, match=message):
        api.nsa_attention(**(inputs | {name: torch.zeros(shape)}))


def test_dtypes_that_do_not_fit(inputs):
    with pytest.raises(ValueError, match="k_slc is torch.bfloat16, q is torch.float32"):
        api.nsa_attention(**(inputs | {"k_slc": inputs["k_slc"].bfloat16()}))
    with pytest.raises(ValueError, match="gates must be of a floating-point dtype, got torch.int64"):
        api.nsa_attention(**(inputs | {"gates": inputs["gates"].long()}))
    with pytest.raises(ValueError, match="q must be of a floating-point dtype"):
        api.nsa_attention(**(inputs | {n: inputs[n].int() for n in NAMES[:7]}))


def test_devices_that_do_not_fit(inputs):
    with pytest.raises(ValueError, match="v_win is on meta, q on cpu"):
        api.nsa_attention(**(inputs | {"v_win": inputs["v_win"].to("meta")}))


def test_an_unknown_implementation(inputs):
    with pytest.raises(ValueError, match="impl='cuda' is not one of auto, triton, sdpa, reference"):
        api.nsa_attention(**inputs, impl="cuda")


def test_auto_says_once_what_it_chose(inputs, caplog):
    log._log.cache_clear()
    with caplog.at_level(logging.INFO, logger=api.__name__):
        for _ in range(3):
            api.nsa_attention(**inputs)
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["nsa attention: sdpa (plain PyTorch), since the tensors are on cpu"]


def test_triton_needs_a_gpu_or_the_interpreter(inputs, fake_triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot be had: the tensors are on cpu, and TRITON_INTERPRET=1"):
        api.nsa_attention(**inputs, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    api.nsa_attention(**inputs, impl="triton")
    api.nsa_attention(**inputs, impl="triton", save_outputs=False)
    assert [(len(args), *rest) for args, *rest in fake_triton.calls] == [
        (10, inputs["scale"], True), (10, inputs["scale"], False),
    ]


def test_triton_says_what_it_lacks(fake_triton, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="not torch.float64"):
        api.resolve_impl("triton", CPU, torch.float64)
    monkeypatch.setattr(api, "TRITON_MODULE", "sieve.kernels.nsa.no_such_module")
    with pytest.raises(ValueError, match="no_such_module is not part of this installation"):
        api.resolve_impl("triton", CPU, torch.float32)


def test_auto_on_cuda_takes_triton_where_it_can(fake_triton, monkeypatch, caplog):
    log._log.cache_clear()
    cuda = torch.device("cuda")
    with caplog.at_level(logging.INFO, logger=api.__name__):
        assert api.resolve_impl("auto", cuda, torch.bfloat16) == "triton"
        assert api.resolve_impl("auto", cuda, torch.float64) == "reference"
        monkeypatch.setattr(api, "TRITON_MODULE", "sieve.kernels.nsa.no_such_module")
        assert api.resolve_impl("auto", cuda, torch.bfloat16) == "reference"
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 3
    assert "triton, on cuda" in messages[0] and "float64" in messages[1] and "no_such_module" in messages[2]


def test_the_front_door_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import sieve.kernels.nsa.api, sieve.kernels.full.api"
    subprocess.run([sys.executable, "-c", code], check=True)
