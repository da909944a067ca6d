"""The decode kernels compile for Hopper without a GPU: on tensor cores, in its registers, several tiles under way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).parents[1] / "sm90.py"
ATTENDING = ["decode_compress.compress_and_window", "decode_select.select", "decode_triton._attend"]
NAMES = sorted([*ATTENDING, "cache_triton._store_block", "cache_triton._store_token", "decode_select.finish",
                "decode_triton._merge", "decode_weigh.weigh_and_merge", "phi_triton._first_layer", "phi_triton._last_layer",
                "project_triton._project", "project_triton._swiglu", "rope_triton._rotate"])  # fmt: skip


def compiled(*shape, spills):
    """spills: bytes a thread. Those of small groups and of fp32, which nobody waits for, differ between compilers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "decode", *(str(x) for x in shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert sorted({k["kernel"] for k in kernels}) == NAMES and len(kernels) == len(NAMES)
    for kernel in kernels:
        assert kernel["shared_kb"] <= 227 and kernel["stack"] <= spills, kernel
    (weights,) = (k for k in kernels if k["kernel"] == "decode_weigh.weigh_and_merge")
    (turn,) = (k for k in kernels if k["kernel"] == "rope_triton._rotate")
    # As sieve.model.rope rounds on a GPU: three products a pair and one more inside a sum, none that the compiler may fuse.
    assert turn["rounded"]["mul"] == 0 and turn["rounded"]["fma.rn"] > 0, turn
    assert turn["rounded"]["mul.rn"] == 3 * turn["rounded"]["fma.rn"] == 3 * turn["rounded"]["sub.rn"], turn
    if shape[0] // shape[1] <= 16:  # three on a multiprocessor
        assert 3 * weights["num_warps"] * 32 * weights["registers"] <= 65536, weights
    return [k for k in kernels if k["kernel"] in ATTENDING]


def check(shape, dtype, spills):
    for kernel in compiled(*shape, dtype, spills=spills):
        assert kernel["stack"] <= 8, kernel
        assert kernel["mma"] or kernel["wgmma"], kernel
        keys = 64 if sum(shape[2:]) <= 256 else 32  # of a tile, or twice those of one of four stages
        under_way = {3: 2 * keys, 4: 3 * keys // 2}[kernel["num_stages"]]
        assert kernel["shared_kb"] >= under_way * sum(shape[2:]) * 2 / 1024, kernel


def test_main_shape():
    check((64, 4, 128, 128), "bfloat16", spills=16)


SHAPES = [(12, 3, 64, 64), (64, 4, 192, 128), (64, 1, 128, 128), (32, 8, 80, 96), (4, 4, 256, 256), (14, 2, 96, 32)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_shapes(shape, dtype):
    check(shape, dtype, spills=300)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 4, 128, 128), (4, 4, 256, 256)], ids=str)
def test_fp32(shape):
    """Where a choice is made anew, whole tiles of queries and keys of 256 fp32 numbers do not fit into registers."""
    compiled(*shape, "float32", spills=1500 if shape[2] == 256 else 400)
