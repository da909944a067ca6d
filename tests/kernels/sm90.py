"""Compiles kernels for sm_90 without a GPU: what their launchers would launch, and what the compiler made of it.

A program, run with TRITON_INTERPRET unset: `python tests/kernels/sm90.py window|operator|decode H HKV DQK DV DTYPE`, or
`moe HIDDEN SIZE EXPERTS TOP_K DTYPE`, prints a JSON line a kernel. Launchers are called on small CPU tensors, and each launch
is compiled instead of run.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1", torch.int16: "i16",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


def describe(argument, specialize: bool):
    """The type of a launch's argument as the compiler takes it: (type or "constexpr", attributes)."""
    if isinstance(argument, torch.Tensor):
        return f"*{TYPES[argument.dtype]}", ALIGNED
    if isinstance(argument, TensorDescriptor):
        sides = ", ".join(str(side) for side in argument.block_shape)
        return f"tensordesc<{TYPES[argument.base.dtype]}[{sides}]>", None
    if isinstance(argument, float):
        return "fp32", None
    if isinstance(argument, int):
        if specialize and argument == 1:
            return "constexpr", None
        return ("i32" if abs(argument) < 2**31 else "i64"), ALIGNED if specialize and argument % 16 == 0 else None
    return "constexpr", None


def resources(kernel) -> dict:
    """Registers and stack bytes a thread, shared memory in KB, tensor-core instructions by kind, and those of fp32 arithmetic:
    a product without .rn may be fused with a sum."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(registers), "stack": int(stack), "shared_kb": kernel.metadata.shared / 1024,
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync.aligned"),
        "rounded": {name: len(re.findall(rf"\b{name}\.f32\b", ptx)) for name in ("mul", "mul.rn", "fma.rn", "sub.rn")},
    }  # fmt: skip


def compile_launch(function: JITFunction, *args, grid, warmup, **kwargs):
    known = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")
    options = {k: kwargs.pop(k) for k in known if k in kwargs}
    values = dict(zip(function.arg_names, args)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = values[parameter.name] if parameter.name in values else parameter.default
        kind, attribute = "constexpr", None
        if not parameter.is_constexpr:
            kind, attribute = describe(value, not parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        if attribute:
            attributes[(i,)] = attribute
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    name = f"{function.fn.__module__.rsplit('.', 1)[-1]}.{function.fn.__name__}"
    print(json.dumps({"kernel": name, **options, **resources(kernel)}), flush=True)


def draw(heads, kv_heads, d_qk, d_v, dtype, tokens=256):
    from sieve.kernels.nsa.geometry import Geometry
    from sieve.kernels.nsa.layout import Packing

    geometry = Geometry(32, 16, 64, 16, 1, 2, 512)
    packing = Packing.of(torch.tensor([0, 100, tokens], dtype=torch.int32), tokens, 156)
    shapes = [(tokens, heads, d_qk)] + [(n, kv_heads, d) for n in (tokens // 16, tokens, tokens) for d in (d_qk, d_v)]
    inputs = [torch.zeros(s, dtype=dtype) for s in (*shapes, (tokens, heads, 3))]
    return inputs, torch.zeros(tokens, heads, d_v, dtype=dtype), packing, geometry


def compile_window(*shape):
    from sieve.kernels.nsa.window_bwd import window_dkv, window_dq
    from sieve.kernels.nsa.window_fwd import window_attention_combine, window_attention_fwd

    (q, *_, k, v, gates), do, packing, _ = draw(*shape)
    _, lse = window_attention_fwd(q, k, v, packing, 512, scale=0.1)
    out = torch.zeros_like(do)
    window_attention_combine(q, k, v, packing, 512, out, out, gates, out, out, lse, scale=0.1)
    window_attention_combine(q, k, v, packing, 512, out, out, gates, out, None, lse, scale=0.1)
    window_dq(do, q, k, v, lse, lse, packing, 512, scale=0.1)
    window_dkv(do, q, k, v, lse, lse, packing, 512, scale=0.1)


def compile_decode(heads, kv_heads, d_qk, d_v, dtype, capacity=65536):
    from sieve.kernels.common import project_triton, rope_triton
    from sieve.kernels.full import decode_triton as full_decode
    from sieve.kernels.nsa import cache_triton, decode_triton, phi_triton
    from sieve.kernels.nsa.decode_tiles import DecodeTiles
    from sieve.kernels.nsa.geometry import Geometry
    from sieve.kernels.nsa.phi import AfterPhi, PhiWeights

    geometry = Geometry(32, 16, 64, 16, 1, 2, 512)
    shapes = [(1, 1, heads, d_qk)] + [(1, kv_heads, n, d) for n in (capacity // 16 + 16, capacity, 512) for d in (d_qk, d_v)]
    tensors = [torch.zeros(s, dtype=dtype) for s in (*shapes, (1, 1, heads, 3))]
    query, key = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 512, dtype=torch.int32)
    tiles = DecodeTiles.of(heads // kv_heads, d_qk, d_v, dtype, torch.device("cpu"))
    # As many parts as eight sequences have on 132 multiprocessors.
    tiles = dataclasses.replace(tiles, programs=33, select_programs=33, overlap=True)
    decode_triton.nsa_decode(*tensors, query, key, capacity, geometry, scale=0.1, tiles=tiles)
    full_decode.cached_attention(tensors[0], *tensors[3:5], query, None, scale=0.1, programs=264, overlap=True)
    raw = [torch.zeros(1, kv_heads, 32, d, dtype=dtype) for d in (d_qk, d_v)]
    new, block = ([torch.zeros(n, kv_heads, d, dtype=dtype) for d in (d_qk, d_v)] for n in (1, 2))
    stores = [cache_triton.Stores(*new, *caches) for caches in (tensors[3:5], tensors[5:7], raw)]
    cache_triton.store_token(query[0], *stores, geometry)
    cache_triton.store_block(query[0], *block, *tensors[1:3], geometry)
    table = [torch.zeros(1, 1, d_qk // 2) for _ in range(2)]
    rope_triton.rotate((tensors[0][0], new[0], new[0]), *table)
    after = AfterPhi((torch.zeros(d_qk, dtype=dtype), 1e-5), [torch.zeros(2, 1, d_qk // 2) for _ in range(2)])
    phi = [
        PhiWeights("mlp", position, w_in, w_out=w_out) for position, w_in, w_out in (
            (torch.zeros(s, dtype=dtype) for s in ((32, d), (2 * d, 32 * d), (d, 2 * d))) for d in (d_qk, d_v)
        )
    ]  # fmt: skip
    joined = [torch.zeros(32, kv_heads, d, dtype=dtype) for d in (d_qk, d_v)]
    phi_triton.compress_token(query[0], *joined, *tensors[1:3], *phi, after, geometry)
    x, weights = torch.zeros(8, 2048, dtype=dtype), [torch.zeros(n * d_qk, 2048, dtype=dtype) for n in (heads, kv_heads)]
    project_triton.project(x, weights)
    project_triton.swiglu(x, *weights[:1] * 2)


def compile_operator(*shape):
    from sieve.kernels.nsa import autograd

    inputs, do, packing, geometry = draw(*shape)
    for keep in (True, False):
        out, indices, lse, outputs = autograd.forward(*inputs, packing, geometry, scale=0.1, keep=keep)
        autograd.backward(do, *inputs, indices, lse, outputs, packing, geometry, scale=0.1)


def compile_moe(hidden, size, num_experts, top_k, dtype):
    from sieve.kernels.moe import triton_ops
    from sieve.kernels.moe.passes import copy_rows, swiglu

    x = torch.zeros(256, hidden, dtype=dtype)
    gate_up, down = (torch.zeros(num_experts, *s, dtype=dtype) for s in ((2 * size, hidden), (hidden, size)))
    experts = torch.arange(top_k).expand(256, -1)
    out, *saved = triton_ops.moe_forward._init_fn(x, gate_up, down, torch.zeros(256, top_k), experts, True)
    saved[1] = saved[1] * 0  # launches were compiled, not run: places would be whatever memory held
    triton_ops.moe_backward._init_fn(out, x, gate_up, down, *saved, top_k, True)
    copy_rows(x, saved[2])
    swiglu(saved[0], *saved[3:])


if __name__ == "__main__":
    JITFunction.run = compile_launch
    torch.empty, torch.Tensor.new_empty, torch.empty_like = torch.zeros, torch.Tensor.new_zeros, torch.zeros_like
    part, heads, kv_heads, d_qk, d_v, dtype = sys.argv[1:7]
    compilers = {"window": compile_window, "operator": compile_operator, "decode": compile_decode, "moe": compile_moe}
    compiler = compilers[part]
    compiler(int(heads), int(kv_heads), int(d_qk), int(d_v), getattr(torch, dtype))
