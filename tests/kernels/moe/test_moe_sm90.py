"""The experts' kernels compile for Hopper without a GPU: within its shared memory, and in bf16 on its tensor cores with
nothing spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).parents[1] / "sm90.py"


def compiled(*shape):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "moe", *(str(x) for x in shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1024, 256, 64, 8), (2048, 512, 64, 6), (2560, 1472, 72, 6), (192, 128, 8, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels(shape, dtype):
    kernels = compiled(*shape, dtype)
    products = [k for k in kernels if k["kernel"].startswith(("gemm.", "gate_up."))]
    assert len(products) == 6 and len(kernels) == 13
    for kernel in kernels:
        assert kernel["shared_kb"] <= 227, kernel
    if dtype == "bfloat16":  # products in fp32 run without tensor cores, and the first one spills
        assert not any(kernel["stack"] for kernel in kernels)
        assert all(kernel["wgmma"] and not kernel["mma"] for kernel in products)
