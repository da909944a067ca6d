"""The selected branch's kernels compile for Hopper without a GPU, on its tensor cores, within registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED_KB = 227
MATRIX = ("select_fwd._forward", "select_dq._backward_q", "select_dkv._backward_kv")


def compiled(*shape):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("select_sm90.py")), *(str(x) for x in shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {line["kernel"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert set(MATRIX) <= set(kernels)
    for kernel in kernels.values():
        assert kernel["shared_kb"] <= SHARED_KB, kernel
    return kernels


def check(kernels):
    for name, kernel in kernels.items():
        # What dk/dv keeps on the stack is read before and after its loop, not in it.
        assert kernel["stack"] <= (32 if name == MATRIX[2] else 0), kernel
        assert not kernel["mma"], kernel  # matrix products of the older, slower kind
        assert bool(kernel["wgmma"]) == (name in MATRIX), kernel


def test_the_benchmark_shape():
    check(compiled(64, 4, 128, 128, "bfloat16", 64, 16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [
    (64, 4, 192, 128, 64, 16), (16, 4, 128, 128, 64, 16), (16, 8, 64, 64, 64, 16), (64, 1, 128, 128, 64, 64),
    (12, 4, 80, 96, 64, 16), (14, 2, 256, 256, 64, 16), (4, 4, 128, 128, 64, 16), (24, 2, 128, 32, 128, 8),
    (20, 4, 192, 128, 96, 16),
], ids=str)  # fmt: skip
def test_other_shapes(shape, dtype):
    check(compiled(*shape[:4], dtype, *shape[4:]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 1, 128, 128, "bfloat16", 16, 64), (6, 2, 32, 64, "float16", 32, 16)], ids=str)
def test_small_blocks(shape):
    """Blocks below 64 keys are too few rows for wgmma in dk/dv, which then takes the older instructions."""
    kernels = compiled(*shape)
    assert all(kernels[name]["wgmma"] for name in MATRIX[:2]) and kernels[MATRIX[2]]["mma"]


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(128, 128), (256, 256)], ids=str)
def test_fp32(dims):
    compiled(16, 2, *dims, "float32", 64, 16)
