"""Compression and selection compile for Hopper into products that run one after the other without a wait in between.

ptxas falls back to a wait after every wgmma where it finds too few registers, or a load between two products, and says so
in a remark only; the kernels then lose a good part of their speed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = '''
import importlib.util, json, subprocess, sys, tempfile
from pathlib import Path

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

spec = importlib.util.spec_from_file_location("sm90", sys.argv[1])
sm90 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sm90)


class Hopper:
    get_current_device = get_current_stream = lambda self, *args: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)


def compile_launch(function, *args, grid, warmup, **kwargs):
    kernel = launch(function, *args, grid=grid, warmup=True, **kwargs)
    if kernel.asm["ptx"] not in remarks:  # told while the next kernel is compiled
        file = Path(folder.name) / f"{len(remarks)}.ptx"
        file.write_text(kernel.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(file), "-o", "/dev/null"]
        remarks[kernel.asm["ptx"]] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    name = function.fn.__module__.rsplit(".", 1)[-1] + "." + function.fn.__name__
    launched.append({"kernel": name, "ptx": kernel.asm["ptx"], **sm90.resources(kernel)})


folder, remarks, launched = tempfile.TemporaryDirectory(), {}, []
driver.set_active(Hopper())
launch, JITFunction.run = JITFunction.run, compile_launch
torch.empty, torch.Tensor.new_empty, torch.empty_like = torch.zeros, torch.Tensor.new_zeros, torch.zeros_like

from sieve.kernels.nsa import compress_fwd, runs_launch, select_dq_hopper, select_hopper
from sieve.kernels.nsa.compress_bwd import compressed_attention_bwd
from sieve.kernels.nsa.scores_topk import select_blocks

heads, kv_heads, d_qk, d_v = map(int, sys.argv[2:6])
(q, k, v, *_), do, packing, geometry = sm90.draw(heads, kv_heads, d_qk, d_v, getattr(torch, sys.argv[6]))
_, lse = compress_fwd.compressed_attention_fwd(q, k, v, packing, geometry, scale=0.1)
o, dq, group = torch.zeros_like(do), torch.zeros_like(q), heads // kv_heads
if runs_launch.fits(q, kv_heads, d_v, geometry):
    for options in ({"geometry": geometry}, {"window": 512}, {"window": 512, "gated": (o, o, torch.zeros(*o.shape[:2], 3), o)}):
        runs_launch.attend(q, k, v, packing, o, lse, scale=0.1, **options)
        options.pop("gated", None)
        runs_launch.attend_dq(do, q, k, v, lse, lse, packing, dq, scale=0.1, add=True, **options)
if select_hopper.fits_shapes(q, kv_heads, d_v, 64):
    union = select_hopper.BlockUnion(*(torch.zeros(kv_heads, 64, 1024, dtype=torch.int32) for _ in range(2)),
        torch.zeros(kv_heads, 64, dtype=torch.int32), 64 // group)
    select_hopper.attend_union(q, k, v, union, 64, o, lse, scale=0.1, first_token=0)
    select_dq_hopper.union_dq(do, q, k, v, union, 64, lse, lse, dq, scale=0.1, add=True)
compressed_attention_bwd(do, q, k, v, lse, lse, packing, geometry, scale=0.1, dq=torch.zeros_like(q))
select_blocks(q, k, lse, packing, geometry, scale=0.1)
told = {ptx: process.communicate()[0] for ptx, process in remarks.items()}
assert not any(process.returncode for process in remarks.values()), told.values()
for kernel in launched:
    print(json.dumps({"serialized": "serialized" in told[kernel.pop("ptx")], **kernel}))
'''


def compiled(*shape):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1] / "sm90.py"), *map(str, shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {k.pop("kernel"): k for k in map(json.loads, run.stdout.splitlines())}
    assert all(k["shared_kb"] <= 227 for k in kernels.values())
    del kernels["compress_dkv._prepare"]  # no products
    return kernels


def test_main_shape():
    kernels = compiled(64, 4, 128, 128, "bfloat16")
    assert sorted(kernels) == [
        "compress_dkv._backward_kv", "compress_dq._backward_q", "compress_fwd._forward",
        "runs_dq_hopper.runs_backward_q", "runs_hopper.runs_forward",
        "scores_topk._select", "select_dq_hopper._backward_q", "select_hopper._forward",
    ]
    for name, kernel in kernels.items():
        assert kernel["wgmma"] and not kernel["mma"] and not kernel["serialized"] and not kernel["stack"], (name, kernel)


SHAPES = [(64, 4, 192, 128), (16, 4, 128, 128), (32, 8, 128, 128), (16, 8, 64, 64), (12, 1, 80, 96), (64, 1, 96, 32)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_shapes(shape):
    for name, kernel in compiled(*shape, "bfloat16").items():
        assert kernel["wgmma"] and not kernel["mma"] and not kernel["serialized"], (name, kernel)
        assert kernel["stack"] <= 96, (name, kernel)  # measured to cost less than smaller tiles


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_widest_heads(dtype):
    compiled(4, 4, 256, 256, dtype)
