"""The whole operator on a GPU in half precision: errors, memory, and what PyTorch does with it around the kernels."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa import triton_ops  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402

pytestmark = pytest.mark.gpu

SIZES = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "init_blocks": 1, "local_blocks": 2}
PAPER = Geometry(**SIZES, topk=16, window_size=512)
SHORT = Geometry(**SIZES, topk=5, window_size=100)
GB = 1 << 30


def draw(tokens, heads, kv_heads, d_qk, d_v, geometry, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = [(tokens, heads, d_qk)]
    shapes += [(n, kv_heads, d) for n in (tokens // geometry.kernel_stride, tokens, tokens) for d in (d_qk, d_v)]
    inputs = [torch.randn(s, device="cuda", dtype=dtype, generator=g) for s in shapes]
    inputs.append(torch.rand(tokens, heads, 3, device="cuda", generator=g).to(dtype))
    return [x.requires_grad_() for x in inputs]


def forward(inputs, packing, geometry, **options):
    return triton_ops.nsa_attention(*inputs, packing, geometry, scale=inputs[0].shape[2] ** -0.5, **options)


def run(inputs, packing, geometry, do, **options):
    out, indices = forward(inputs, packing, geometry, **options)
    return out.detach(), indices, torch.autograd.grad(out, inputs, do)


def plain(inputs, packing, geometry, indices, do, dense, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = dense.nsa(*inputs, packing, geometry, indices, inputs[0].shape[2] ** -0.5)
    return out.detach(), torch.autograd.grad(out, inputs, do.to(dtype))


SHAPES = [  # query heads, KV heads, d_qk, d_v
    (16, 1, 128, 128), (64, 4, 192, 128), (12, 4, 80, 96), (5, 1, 64, 64), (7, 1, 32, 256), (12, 1, 256, 192),
    (64, 1, 96, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_half_precision(shape, dtype, dense, poison):
    packing = dense.pack([500, 1, 0, 123, 31], "cuda")
    inputs = draw(655, *shape, SHORT, dtype)
    do = torch.randn(655, shape[0], shape[3], device="cuda", dtype=dtype)
    out, indices, grads = run(inputs, packing, SHORT, do)
    exact, exact_grads = plain(inputs, packing, SHORT, indices, do, dense, torch.float64)
    yard, yard_grads = plain(inputs, packing, SHORT, indices, do, dense, dtype)
    names = "out q k_cmp v_cmp k_slc v_slc k_win v_win gates".split()
    for name, got, half, want in zip(names, (out, *grads), (yard, *yard_grads), (exact, *exact_grads)):
        for ours, theirs in zip(dense.relative_errors(got, want), dense.relative_errors(half, want)):
            assert ours <= 2 * theirs, (name, ours, theirs)


def test_fp32_is_exact_to_fp32(dense, poison):
    packing = dense.pack([200, 100], "cuda")
    inputs = draw(300, 8, 2, 64, 64, SHORT, torch.float32)
    do = torch.randn(300, 8, 64, device="cuda")
    out, indices, grads = run(inputs, packing, SHORT, do)
    exact, exact_grads = plain(inputs, packing, SHORT, indices, do, dense, torch.float64)
    for got, want in zip((out, *grads), (exact, *exact_grads)):
        assert dense.relative_errors(got, want)[0] < 1e-5


def test_forty_documents(dense, poison):
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 400, (40,), generator=g).tolist()
    tokens = sum(lengths)
    packing = dense.pack(lengths, "cuda")
    inputs = draw(tokens, 8, 2, 64, 64, SHORT)
    do = torch.randn(tokens, 8, 64, device="cuda", dtype=torch.bfloat16)
    out, indices, grads = run(inputs, packing, SHORT, do)
    first, last = sum(lengths[:30]), sum(lengths[:31])
    part = slice(first, last)
    alone = [x.detach()[part] for x in inputs]
    slot, count = first // SHORT.kernel_stride, (last - first) // SHORT.kernel_stride
    alone[1:3] = [x.detach()[slot : slot + count] for x in inputs[1:3]]
    alone = [x.clone().requires_grad_() for x in alone]
    out2, indices2, grads2 = run(alone, dense.pack([last - first], "cuda"), SHORT, do[part])
    assert torch.equal(indices[part], indices2)
    assert dense.relative_errors(out[part], out2)[0] < 1e-2
    assert dense.relative_errors(grads[0][part], grads2[0])[0] < 1e-2
    assert dense.relative_errors(grads[1][slot : slot + count], grads2[1])[0] < 1e-2


def test_runs_and_slices_and_rows_are_bit_equal(dense):
    packing = dense.pack([8192, 8192], "cuda")
    inputs = draw(16384, 64, 4, 128, 128, PAPER)
    do = torch.randn(16384, 64, 128, device="cuda", dtype=torch.bfloat16)
    out, indices, grads = run(inputs, packing, PAPER, do)
    for options in ({}, {}, {"save_outputs": False}):
        out2, indices2, grads2 = run(inputs, packing, PAPER, do, **options)
        assert torch.equal(out, out2) and torch.equal(indices, indices2)
        for name, a, b in zip("q k_cmp v_cmp k_slc v_slc k_win v_win gates".split(), grads, grads2):
            assert torch.equal(a, b), name
    half = [x.detach()[: x.shape[0] // 2].clone().requires_grad_() for x in inputs]
    out2, indices2, _ = run(half, dense.pack([8192], "cuda"), PAPER, do[:8192])
    assert torch.equal(out[:8192], out2) and torch.equal(indices[:8192], indices2)


def test_one_token_and_no_visible_block(dense, poison):
    for lengths in ([1], [20], [1, 1, 1]):
        tokens = sum(lengths)
        inputs = draw(tokens, 4, 2, 64, 64, PAPER)
        out, indices, grads = run(inputs, dense.pack(lengths, "cuda"), PAPER, torch.ones_like(inputs[0]))
        assert (indices[:, :, 0] == 0).all() and (indices[:, :, 1:] == -1).all()
        assert out.isfinite().all() and all(x.isfinite().all() for x in grads)


def test_compiles_in_one_graph(dense):
    packing = dense.pack([700, 324], "cuda")
    inputs = draw(1024, 16, 2, 128, 128, SHORT)
    do = torch.randn(1024, 16, 128, device="cuda", dtype=torch.bfloat16)

    def call(*inputs):
        out, indices = forward([x * 1.0 for x in inputs], packing, SHORT)
        return out * 2.0, indices

    def grads(f):
        out, indices = f(*inputs)
        return out.detach(), indices, *torch.autograd.grad(out, inputs, do)

    for a, b in zip(grads(call), grads(torch.compile(call, fullgraph=True))):
        assert torch.equal(a, b)


def test_cuda_graph(dense):
    packing = dense.pack([700, 324], "cuda")
    inputs = draw(1024, 16, 2, 128, 128, SHORT)
    do = torch.randn(1024, 16, 128, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, packing, SHORT, do)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, indices, grads = run(inputs, packing, SHORT, do)
    with torch.no_grad():
        for x, y in zip(inputs, draw(1024, 16, 2, 128, 128, SHORT, seed=5)):
            x.copy_(y)
        packing.cu_seqlens[1] = 300  # other documents through the same graph
        fresh = dense.pack([300, 724], "cuda")
        packing.doc.copy_(fresh.doc)
        packing.position.copy_(fresh.position)
    graph.replay()
    torch.cuda.synchronize()
    want = run(inputs, fresh, SHORT, do)
    assert torch.equal(out, want[0]) and torch.equal(indices, want[1])
    for a, b in zip(grads, want[2]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save_outputs", [True, False])
def test_no_host_synchronisation(save_outputs, dense):
    packing = dense.pack([900, 124], "cuda")
    inputs = draw(1024, 16, 2, 128, 128, SHORT)
    do = torch.randn(1024, 16, 128, device="cuda", dtype=torch.bfloat16)
    run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def nbytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("mode", ["inference", "recompute", "keep"])
def test_memory_at_64k(mode, dense):
    """Beyond inputs, outputs and gradients: 1.5 GB forward, 4 GB backward; kept branch outputs count as the latter."""
    tokens = 65_536
    packing = dense.pack([tokens], "cuda")
    inputs = draw(tokens, 64, 4, 128, 128, PAPER)
    do = torch.randn(tokens, 64, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(mode != "inference"):
        out, indices = forward(inputs, packing, PAPER, save_outputs=mode == "keep")
    kept = 3 * nbytes(out) if mode == "keep" else 0
    extra = torch.cuda.max_memory_allocated() - start - nbytes(out, indices) - kept
    print(f"{mode}: forward {extra / GB:.2f} GB beyond inputs and outputs, and {kept / GB:.2f} GB kept")
    assert extra <= 1.5e9
    if mode == "inference":
        return
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, inputs, do)
    extra = torch.cuda.max_memory_allocated() - start - nbytes(out, indices, *grads)
    print(f"{mode}: backward {extra / GB:.2f} GB beyond inputs, outputs and gradients")
    assert extra <= 4e9
