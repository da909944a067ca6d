"""Rotations in one launch against sieve.model.rope's own, which training takes: on a GPU to the bit."""

import os

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.common import rope_triton  # noqa: E402
from sieve.model import rope  # noqa: E402
from sieve.model.config import RopeConfig  # noqa: E402

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
CASES = [((3, 1, 2), 12), ((4, 2), 80), ((1,), 192), ((5, 5, 5), 2), ((2, 3), 256)]


def draw(tokens, heads, dim, dtype, device, fused=False):
    """x [tokens, heads[i], dim] each, with `fused` views of one product's columns; cos and sin."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, sum(heads) * dim, generator=rng).to(device, dtype)
    xs = [part.unflatten(-1, (-1, dim)) for part in x.split([h * dim for h in heads], -1)]
    position = torch.randint(0, 100_000, (tokens,), generator=rng).int().to(device)
    return [x if fused else x.contiguous() for x in xs], rope.rotation(position, RopeConfig(), dim)


def plain(xs, table):
    return tuple(rope._turn(x, *table, 1) for x in xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads, dim", CASES, ids=str)
def test_within_a_rounding(device, heads, dim, dtype, poison):
    """The interpreter and CPUs round the products otherwise than GPUs, by one unit in the last place of a summand."""
    for tokens in (1, 7, 150):
        for fused in (False, True):
            xs, table = draw(tokens, heads, dim, dtype, device, fused)
            for got, want, x in zip(rope_triton.rotate(xs, *table), plain(xs, table), xs):
                assert got.dtype == dtype and got.is_contiguous() and got.shape == x.shape
                torch.testing.assert_close(got, want, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


def test_no_token(device):
    xs, table = draw(0, (2, 1), 8, torch.float32, device)
    assert [x.shape for x in rope_triton.rotate(xs, *table)] == [(0, 2, 8), (0, 1, 8)]


@pytest.mark.skipif(not interpreted, reason="a GPU's own is below")
def test_a_cpu_is_left_to_pytorch(device, monkeypatch):
    monkeypatch.setattr(rope_triton, "rotate", None)
    xs, table = draw(3, (2, 1), 8, torch.float32, device)
    assert all(torch.equal(a, b) for a, b in zip(rope.rotate_each(xs, table), plain(xs, table)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, dim", [*CASES, ((12, 3, 3), 64), ((64, 4, 4), 128), ((14, 2), 96)], ids=str)
def test_equal_bits(heads, dim, dtype):
    for tokens in (1, 8, 64, 5000):
        for fused in (False, True):
            xs, table = draw(tokens, heads, dim, dtype, "cuda", fused)
            for got, want in zip(rope_triton.rotate(xs, *table), plain(xs, table)):
                assert torch.equal(got, want), (tokens, fused, (got - want).abs().max())


@pytest.mark.gpu
def test_used_where_no_gradient_is_wanted(monkeypatch):
    calls, original = [], rope_triton.rotate
    monkeypatch.setattr(rope_triton, "rotate", lambda *args: calls.append(1) or original(*args))
    xs, table = draw(9, (4, 2), 64, torch.bfloat16, "cuda")
    wanted = rope.rotate_each([x.requires_grad_() for x in xs], table)
    assert not calls and all(x.requires_grad for x in wanted)
    with torch.no_grad():
        found = rope.rotate_each(xs, table)
    assert len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(found, wanted))
    double = [x.detach().double() for x in xs]
    rope.rotate_each(double, table)
    assert len(calls) == 1


@pytest.mark.gpu
def test_replayed_from_a_graph():
    xs, table = draw(4, (12, 3, 3), 64, torch.bfloat16, "cuda")
    rope_triton.rotate(xs, *table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rope_triton.rotate(xs, *table)
    for seed in range(20):
        for x in xs:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, plain(xs, table)))
