"""Products of a few tokens in one launch against torch.nn.functional.linear."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from sieve.kernels.common import project_triton  # noqa: E402

SIZES = [(5,), (16, 3, 40), (32, 8, 8, 16, 1, 17, 24, 12)]


def draw(tokens, hidden, sizes, dtype, device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=rng)
    weights = [hidden**-0.5 * torch.randn(n, hidden, generator=rng) for n in sizes]
    return x.to(device, dtype), [w.to(device, dtype) for w in weights]


def swiglu(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, hidden", [(1, 24), (3, 300), (17, 40), (64, 33)])
def test_as_one_by_one(device, tokens, hidden, dtype, poison):
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=2e-3)
    for sizes in SIZES:
        x, weights = draw(tokens, hidden, sizes, dtype, device)
        for got, w in zip(project_triton.project(x, weights), weights, strict=True):
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(got, F.linear(x, w), **tolerance)
    x, weights = draw(tokens, hidden, (50, 50), dtype, device)
    torch.testing.assert_close(project_triton.swiglu(x, *weights), swiglu(x, *weights), **tolerance)


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 33, 64])
@pytest.mark.parametrize("hidden", [768, 1000, 4096])
def test_as_exact_as_pytorch(hidden, tokens, dtype):
    """Errors against float64 at most a quarter above PyTorch's."""
    x, weights = draw(tokens, hidden, (768, 192, 192, 192, 192, 192, 192, 36), dtype, "cuda")
    outs = project_triton.project(x, weights)
    results = [(out, F.linear(x, w), F.linear(x.double(), w.double())) for out, w in zip(outs, weights)]
    x, weights = draw(tokens, hidden, (2048, 2048), dtype, "cuda")
    exact = swiglu(x.double(), *(w.double() for w in weights))
    for got, theirs, want in [*results, (project_triton.swiglu(x, *weights), swiglu(x, *weights), exact)]:
        assert rms(got - want) <= 1.25 * rms(theirs - want) + 4e-6 * rms(want)


@pytest.mark.gpu
def test_replayed_from_a_graph():
    """Layer after layer, each launch with what the one before gave: those that begin early wait nevertheless."""
    x, weights = draw(4, 768, (768, 192, 36), torch.bfloat16, "cuda")
    _, (gate, up) = draw(4, 768, (768, 768), torch.bfloat16, "cuda")

    def layers():
        y = x
        for _ in range(20):
            y, *rest = project_triton.project(y, weights)
            y = project_triton.swiglu(y, gate, up)
            y = y / y.float().square().mean().sqrt().to(y.dtype)
        return y, *rest

    want = layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers()
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, want))
