"""What PyTorch does around the whole operator: registration, compilation, checkpointing, graphs, no waiting."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

from sieve.kernels.nsa import api, triton_ops  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402

SMALL = Geometry(8, 4, 16, topk=3, init_blocks=1, local_blocks=1, window_size=12)
SHORT = Geometry(32, 16, 64, topk=5, init_blocks=1, local_blocks=2, window_size=100)


def attend(inputs, packing, geometry, save_outputs=True):
    scale = inputs[0].shape[2] ** -0.5
    return api.nsa_attention(*inputs, packing, geometry, scale=scale, impl="triton", save_outputs=save_outputs)


@pytest.mark.parametrize("keep", [True, False])
def test_registration(keep, device, dense, op):
    packing = dense.pack([4, 8], device)
    inputs = op.draw(12, 2, 1, 16, 16, SMALL, device)
    sizes = list(vars(SMALL).values())
    arguments = *inputs, packing.cu_seqlens, packing.doc, packing.position, packing.max_seqlen, sizes, 0.2, keep
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(triton_ops.nsa_forward, arguments, test_utils=checks)


def check_compiled(rows, shape, geometry, device, dtype, backend, dense, op):
    """One graph, whatever the lengths: the first call compiles for its own, the second for all; bit-equal results."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    def call(packing, *inputs):
        out, indices = attend([x * 1.0 for x in inputs], packing, geometry)
        return out * 2.0, indices

    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for number, lengths in enumerate(rows):
        packing = dense.pack(lengths, device)
        inputs = op.draw(sum(lengths), *shape, geometry, device, dtype, seed=number)
        results = []
        for f in (call, compiled):
            out, indices = f(packing, *inputs)
            results.append((out.detach(), indices, *torch.autograd.grad(out, inputs, op.cotangent(inputs))))
        for name, a, b in zip(("out", "indices", *op.names), *results):
            assert torch.equal(a, b), name
    assert not counters["graph_break"]
    assert counter.frame_count == 2, "compiled anew for each length"


def test_compiles_in_one_graph(device, dense, op):
    check_compiled([[8, 4], [9, 2, 5], [13, 7]], (2, 1, 16, 16), SMALL, device, torch.float32, "aot_eager", dense, op)


@pytest.mark.gpu
def test_gpu_compiles_in_one_graph(dense, op):
    rows = [700, 324], [300, 1, 1000], [801, 700]
    check_compiled(rows, (16, 2, 128, 128), SHORT, "cuda", torch.bfloat16, "inductor", dense, op)


def check_checkpointed(inputs, packing, geometry, op):
    """The backward computes the forward again, and has the same bits."""
    do = op.cotangent(inputs)

    def call(*inputs):
        return attend(inputs, packing, geometry)[0]

    grads = torch.autograd.grad(call(*inputs), inputs, do)
    again = torch.autograd.grad(checkpoint(call, *inputs, use_reentrant=False), inputs, do)
    for name, a, b in zip(op.names, grads, again):
        assert torch.equal(a, b), name


def test_checkpointing(device, dense, op):
    check_checkpointed(op.draw(12, 2, 1, 16, 16, SMALL, device), dense.pack([10, 2], device), SMALL, op)


@pytest.mark.gpu
def test_gpu_checkpointing(dense, op):
    inputs = op.draw(1024, 16, 2, 128, 128, SHORT, "cuda", torch.bfloat16)
    check_checkpointed(inputs, dense.pack([700, 324], "cuda"), SHORT, op)


def test_inference_keeps_nothing(device, dense, op):
    """Under no_grad, or where no input wants a gradient, the branches' outputs are not kept."""
    packing = dense.pack([12], device)
    inputs = op.draw(12, 2, 1, 16, 16, SMALL, device)
    seen, forward = [], triton_ops.nsa_forward
    try:
        triton_ops.nsa_forward = lambda *args: seen.append(args[-1]) or forward(*args)
        attend(inputs, packing, SMALL)
        attend(inputs, packing, SMALL, save_outputs=False)
        attend([x.detach() for x in inputs], packing, SMALL)
        with torch.no_grad():
            attend(inputs, packing, SMALL)
    finally:
        triton_ops.nsa_forward = forward
    assert seen == [True, False, False, False]


GROUPS = [(16, 2, 128, 128), (8, 2, 128, 128)]  # selection by unions, and by lists


@pytest.mark.gpu
@pytest.mark.parametrize("save_outputs", [True, False])
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_gpu_cuda_graph(shape, save_outputs, dense, op):
    """Forward and backward are captured once, and replayed for other values and other documents of the same row."""
    packing = dense.pack([700, 324], "cuda")
    inputs = op.draw(1024, *shape, SHORT, "cuda", torch.bfloat16)
    do = op.cotangent(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op.run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, indices, grads = op.run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    fresh = dense.pack([300, 724], "cuda")
    with torch.no_grad():
        for x, y in zip(inputs, op.draw(1024, *shape, SHORT, "cuda", torch.bfloat16, seed=5)):
            x.copy_(y)
        for name in ("cu_seqlens", "doc", "position"):
            getattr(packing, name).copy_(getattr(fresh, name))
    graph.replay()
    torch.cuda.synchronize()
    # max_seqlen is a host number, an upper bound: both know 700 and 724 as the graph does.
    want = op.run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    assert torch.equal(out, want[0]) and torch.equal(indices, want[1])
    for name, a, b in zip(op.names, grads, want[2]):
        assert torch.equal(a, b), name
    assert torch.equal(out, op.run(inputs, fresh, SHORT, do)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("save_outputs", [True, False])
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_gpu_no_host_synchronisation(shape, save_outputs, dense, op):
    packing = dense.pack([900, 124], "cuda")
    inputs = op.draw(1024, *shape, SHORT, "cuda", torch.bfloat16)
    do = op.cotangent(inputs)
    op.run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.run(inputs, packing, SHORT, do, save_outputs=save_outputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
