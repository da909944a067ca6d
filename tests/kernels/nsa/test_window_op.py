"""Sliding-window attention as an operator: differentiable, traceable, and the same as plain attention."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa.window import window_attention, window_forward  # noqa: E402


def draw(tokens, heads, kv_heads, d_qk, d_v, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = (tokens, heads, d_qk), (tokens, kv_heads, d_qk), (tokens, kv_heads, d_v)
    return [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("width", [6, None])
def test_gradients(width, device, dense, poison):
    packing = dense.pack([9, 1, 14], device)
    inputs = draw(24, 4, 2, 32, 48, device)
    o, lse = window_attention(*inputs, packing, width, scale=0.2)
    weights = torch.randn(o.shape).to(device)
    grads = torch.autograd.grad(o, inputs, weights.transpose(0, 1).contiguous().transpose(0, 1))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = dense.attend(*exact, dense.window_mask(packing, width or 24), 0.2)
    for got, x in zip((o, *grads), (want, *torch.autograd.grad(want, exact, weights.double()))):
        assert torch.allclose(got.double(), x, atol=1e-5)


def test_registration(device, dense):
    packing = dense.pack([5, 3], device)
    inputs = draw(8, 2, 1, 16, 16, device)
    arguments = (*inputs, packing.cu_seqlens, packing.doc, packing.position, 5, 4, 0.25)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(window_forward, arguments, test_utils=checks)


def test_mistakes_are_named(device, dense):
    packing = dense.pack([5], device)
    inputs = draw(5, 2, 1, 16, 16, device)
    for width, scale, message in ((0, 1.0, "window_size=0"), (4, -1.0, "scale=-1.0")):
        with pytest.raises(ValueError, match=message):
            window_attention(*inputs, packing, width, scale=scale)


@pytest.mark.gpu
def test_gpu_compiles_in_one_graph(dense):
    packing = dense.pack([700, 324], "cuda")
    inputs = draw(1024, 16, 2, 128, 128, "cuda", torch.bfloat16)

    def call(*inputs):
        return window_attention(*(x * 1.0 for x in inputs), packing, 100, scale=0.1)[0] * 2.0

    eager, compiled = (f(*inputs) for f in (call, torch.compile(call, fullgraph=True)))
    assert torch.equal(eager, compiled)
    do = torch.randn_like(eager)
    for a, b in zip(torch.autograd.grad(eager, inputs, do), torch.autograd.grad(compiled, inputs, do)):
        assert torch.equal(a, b)
