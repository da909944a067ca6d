"""The selected branch's kernels compile for Hopper without a GPU: on its tensor cores, within registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED_KB = 227
BY_UNION = {"select_fwd._forward", "select_dq._backward_q", "select_dkv._backward_kv"}
BY_LIST = {"select_gather._attend_lists", "select_dkv._backward_kv"}


def compiled(*shape):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("select_sm90.py")), *(str(x) for x in shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared_kb"] <= SHARED_KB, kernel
    return kernels


def check(kernels, matrix, spills=64):
    assert matrix <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        # What dk/dv keeps on the stack is read before and after its loop, not in it.
        assert kernel["stack"] <= (64 if kernel["kernel"] == "select_dkv._backward_kv" else spills), kernel
        assert not kernel["mma"], kernel  # matrix products of the older, slower kind
        assert bool(kernel["wgmma"]) == (kernel["kernel"] in matrix), kernel


def test_the_benchmark_shape():
    check(compiled(64, 4, 128, 128, "bfloat16", 64, 16), BY_UNION, spills=0)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    (64, 4, 192, 128, "bfloat16", 64, 16), (64, 1, 128, 128, "bfloat16", 64, 64), (14, 2, 256, 256, "bfloat16", 64, 16),
    (24, 2, 128, 32, "float16", 128, 8), (12, 1, 80, 96, "float16", 64, 16),
], ids=str)  # fmt: skip
def test_other_shapes(shape):
    check(compiled(*shape), BY_UNION)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    (16, 4, 128, 128, "bfloat16", 64, 16), (16, 8, 64, 64, "float16", 64, 16), (4, 4, 128, 128, "bfloat16", 128, 8),
    (12, 4, 192, 80, "float16", 48, 16),
], ids=str)  # fmt: skip
def test_small_groups(shape):
    check(compiled(*shape), BY_LIST)


@pytest.mark.slow
def test_small_blocks():
    """Blocks below 64 keys are too few rows for wgmma in dk/dv, which then takes the older instructions."""
    kernels = compiled(16, 1, 128, 128, "bfloat16", 16, 64)
    for kernel in kernels:
        if kernel["kernel"] in BY_UNION:
            assert bool(kernel["mma"]) == (kernel["kernel"] == "select_dkv._backward_kv"), kernel


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(128, 128), (256, 256)], ids=str)
def test_fp32(dims):
    compiled(16, 2, *dims, "float32", 64, 16)
