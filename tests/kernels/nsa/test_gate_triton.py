"""The gated sum and its one-pass backward against float64."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa.gate import combine, combine_backward  # noqa: E402


def draw(tokens, heads, d, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    outputs = [torch.randn(tokens, heads, d, generator=g).to(device, dtype) for _ in range(3)]
    do = torch.randn(tokens, heads, d, generator=g).to(device, dtype)
    gates = torch.rand(tokens, heads, 3, generator=g).to(device, dtype)
    lse = [torch.randn(tokens, heads, generator=g).to(device) for _ in range(3)]
    return outputs, do, gates, lse


def run_backward(do, outputs, gates, lse):
    dgates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    deltas, shifted = ([torch.empty_like(x) for x in lse] for _ in range(2))
    combine_backward(do, outputs, gates, lse, dgates, deltas, shifted)
    return dgates, deltas, shifted


@pytest.mark.parametrize("tokens, heads, d", [(1, 1, 32), (11, 3, 80), (20, 4, 128), (5, 2, 192), (3, 2, 256)])
def test_value_and_backward(tokens, heads, d, device, dense, poison):
    outputs, do, gates, lse = draw(tokens, heads, d, device)
    exact = sum(gates[:, :, i, None].double() * o.double() for i, o in enumerate(outputs))
    assert torch.allclose(combine(*outputs, gates).double(), exact, atol=1e-6)
    dgates, deltas, shifted = run_backward(do, outputs, gates, lse)
    for i in range(3):
        delta = (outputs[i].double() * do.double()).sum(-1)
        assert torch.allclose(dgates[:, :, i].double(), delta, atol=1e-4)
        assert torch.allclose(deltas[i].double(), delta, atol=1e-4)
        assert torch.allclose(shifted[i].double(), lse[i].double() - gates[:, :, i].double().log(), atol=1e-5)


def test_empty_rows_closed_gates_and_strides(device, poison):
    outputs, do, gates, lse = draw(6, 2, 32, device)
    lse[0][2] = -float("inf")
    gates[2, 0, 0] = 0.0
    gates[4, 1, 2] = 0.0
    want = run_backward(do, outputs, gates, lse)
    assert (want[2][0][2] == -float("inf")).all()
    assert want[2][2][4, 1] == float("inf")
    strided = gates.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    across = do.transpose(0, 1).contiguous().transpose(0, 1)
    got = run_backward(across, outputs, strided, lse)
    assert torch.equal(got[0], want[0])
    for a, b in zip((*got[1], *got[2]), (*want[1], *want[2])):
        assert torch.equal(a, b)
    assert torch.equal(combine(*outputs, strided), combine(*outputs, gates))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_errors_are_those_of_half_precision(dtype, dense, poison):
    outputs, do, gates, lse = draw(4096, 64, 128, "cuda", dtype)
    exact = sum(gates[:, :, i, None].double() * o.double() for i, o in enumerate(outputs))
    plain = sum(gates[:, :, i, None] * o for i, o in enumerate(outputs))
    errors = dense.relative_errors
    for ours, theirs in zip(errors(combine(*outputs, gates), exact), errors(plain, exact)):
        assert ours <= 2 * theirs
    dgates, deltas, _ = run_backward(do, outputs, gates, lse)
    for i in range(3):
        delta = (outputs[i].double() * do.double()).sum(-1)
        plain = (outputs[i] * do).sum(-1)
        for ours, theirs in zip(errors(dgates[:, :, i], delta), errors(plain, delta)):
            assert ours <= 2 * theirs
        assert errors(deltas[i], delta)[0] < 1e-6
