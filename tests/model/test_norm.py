import torch

from sieve.model.norm import RMSNorm


def expected(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def norm_of(size, dtype, eps=1e-3):
    norm = RMSNorm(size, eps).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, size))
    return norm


def test_the_formula_and_its_gradients():
    torch.manual_seed(0)
    norm = norm_of(6, torch.float64)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), expected(x, norm.weight, 1e-3))

    def through(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(through, (x, norm.weight))


def test_half_precision_is_computed_in_fp32():
    torch.manual_seed(0)
    norm = norm_of(64, torch.bfloat16)
    x = (300 * torch.randn(50, 64)).bfloat16().requires_grad_()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    # One rounding at the end, so the result is the rounded exact value.
    assert torch.equal(y, expected(x.double(), norm.weight.double(), 1e-3).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.bfloat16
