"""Kernels compile for Hopper without a GPU, on its tensor cores, within its registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED_KB = 227
SPILLS = 96  # bytes a thread: tiles that spill so much were the fastest on an H200
PROGRAM = Path(__file__).parents[1] / "sm90.py"


def compiled(part, *shape):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), part, *(str(x) for x in shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(kernels):
    for kernel in kernels:
        assert kernel["shared_kb"] <= SHARED_KB, kernel
        assert kernel["stack"] <= SPILLS, kernel
        assert kernel["mma"] == 0, kernel  # matrix products of the older, slower kind


def test_window_kernels_of_the_paper():
    kernels = compiled("window", 64, 4, 192, 128, "bfloat16")
    check(kernels)
    assert len(kernels) == 5 and all(kernel["wgmma"] for kernel in kernels)


SHAPES = [(64, 4, 128, 128), (64, 4, 192, 128), (16, 4, 128, 128), (16, 8, 64, 64), (12, 1, 80, 96), (4, 4, 256, 256)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_operator(shape, dtype):
    check(compiled("operator", *shape, dtype))


@pytest.mark.slow
def test_operator_in_fp32():
    for kernel in compiled("operator", 8, 2, 256, 128, "float32"):
        assert kernel["shared_kb"] <= SHARED_KB, kernel
