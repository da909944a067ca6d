"""Choice of implementation, mistakes, tracing, and the seam for expert parallelism."""

import pytest
import torch

from sieve.kernels.moe import api, reference
from sieve.kernels.moe.api import resolve_impl, routed_experts


def inputs(tokens=20, hidden=16, num_experts=4, top_k=2, size=8):
    g = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(s, generator=g).requires_grad_()
        for s in ((tokens, hidden), (num_experts, 2 * size, hidden), (num_experts, hidden, size))
    )
    experts = torch.rand(tokens, num_experts, generator=g).argsort(1)[:, :top_k]
    return x, gate_up, down, experts, torch.rand(tokens, top_k, generator=g).requires_grad_()


def test_mistakes():
    x, gate_up, down, experts, weights = inputs()
    with pytest.raises(ValueError, match=r"x \[20, 8\], gate_up .* do not fit"):
        routed_experts(x[:, :8], gate_up, down, experts, weights)
    with pytest.raises(ValueError, match=r"must both be \[T, k\] with T=20"):
        routed_experts(x, gate_up, down, experts, weights[:, :1])
    with pytest.raises(ValueError, match="impl='fast' is not one of auto, torch, mixed, triton"):
        routed_experts(x, gate_up, down, experts, weights, impl="fast")
    with pytest.raises(ValueError, match="impl='triton' permutes by itself"):
        routed_experts(x, gate_up, down, experts, weights, impl="triton", dispatch=reference.LocalDispatch())


def test_choice(monkeypatch):
    assert resolve_impl("auto", torch.device("cpu"), torch.float32) == "torch"
    monkeypatch.setattr(api, "AUTO_ON_CUDA", "triton")
    assert resolve_impl("auto", torch.device("cpu"), torch.float32) == "torch"
    assert resolve_impl("auto", torch.device("cuda"), torch.float64) == "torch"
    with pytest.raises(ValueError, match="impl='mixed' cannot be had: its kernels take"):
        resolve_impl("mixed", torch.device("cuda"), torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        resolve_impl("triton", torch.device("cpu"), torch.float32)


class HalfEach:
    """Expert parallelism in one process: this end keeps experts [0, E / 2), routes to the others go nowhere."""

    def send(self, x, experts, weights, num_experts):
        here = experts < num_experts // 2
        # Routes to elsewhere are counted at an expert of their own, whose rows are cut off.
        sent = reference.LocalDispatch().send(
            x, experts.where(here, num_experts // 2), weights * here, num_experts // 2 + 1
        )
        return sent._replace(ends=sent.ends[:-1].index_fill(0, torch.tensor(num_experts // 2 - 1), len(sent.rows)))

    def back(self, y, handle):
        return reference.LocalDispatch().back(y, handle)


def test_another_dispatch_can_bring_other_experts():
    """The halves of the experts, each through the seam alone, add up to the whole."""
    x, gate_up, down, experts, weights = inputs()
    whole = routed_experts(x, gate_up, down, experts, weights)
    first = reference.routed_experts(x, gate_up[:2], down[:2], experts, weights, 4, HalfEach())
    second = reference.routed_experts(x, gate_up[2:], down[2:], (experts + 2) % 4, weights, 4, HalfEach())
    torch.testing.assert_close(first + second, whole)


@pytest.mark.parametrize("impl", ["triton", "mixed"])
def test_the_operator_traces_without_a_break(impl, monkeypatch):
    pytest.importorskip("triton")
    from sieve.kernels.moe import triton_ops

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, gate_up, down, experts, weights = inputs()
    arguments = (x, gate_up, down, weights, experts, impl == "triton")
    torch.library.opcheck(
        triton_ops.moe_forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(routed_experts, fullgraph=True, backend=count, dynamic=False)
    leaves = (x, gate_up, down, weights)
    plain = routed_experts(x, gate_up, down, experts, weights, impl=impl)
    traced = compiled(x, gate_up, down, experts, weights, impl=impl)
    assert torch.equal(plain, traced) and len(graphs) == 1
    for a, b in zip(torch.autograd.grad(plain.sum(), leaves), torch.autograd.grad(traced.sum(), leaves)):
        assert torch.equal(a, b)
