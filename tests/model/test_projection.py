"""One product over several layers' weights is what the layers make one by one."""

import torch
from torch import nn

from sieve.model.projection import project


def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    layers = [nn.Linear(6, n, bias=False, dtype=torch.float64) for n in (8, 3, 5)]
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    apart = project(x, *layers)
    assert all(torch.equal(out, layer(x)) for out, layer in zip(apart, layers))
    calls = []

    def backend(graph, inputs):
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    together = torch.compile(project, backend=backend, fullgraph=True)(x, *layers)
    assert calls.count(torch._C._nn.linear) == 1
    for out, other in zip(together, apart):
        torch.testing.assert_close(out, other)
    weights = [torch.randn_like(out) for out in apart]
    leaves = [layer.weight for layer in layers] + [x]
    grads = [torch.autograd.grad(outs, leaves, weights, retain_graph=True) for outs in (together, apart)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
