import logging

import pytest
import torch

from sieve.model import loss as loss_module
from sieve.model.config import LossConfig
from sieve.model.loss import chunk_size, linear_cross_entropy, resolve_impl

T, D, V = 50, 12, 37


@pytest.fixture
def case():
    torch.manual_seed(0)
    x = torch.randn(T, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    labels = torch.randint(0, V, (T,))
    labels[::7] = -100
    return x, weight, labels


def plain(x, weight, labels, z_loss=0.0):
    """All logits at once, by autograd: loss sum, cross-entropy sum, per token."""
    logits = (x @ weight.T).double()
    token = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    penalty = logits.logsumexp(-1).square()[labels != -100].sum()
    return token.sum() + z_loss * penalty, token.sum(), token


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 16, 50, 1024])
def test_chunks_equal_the_whole(case, chunk, z_loss):
    x, weight, labels = case
    config = LossConfig(chunk_size=chunk, z_loss=z_loss)
    loss, ce, token = linear_cross_entropy(x, weight, labels, config, per_token=True)
    wanted = plain(x, weight, labels, z_loss)
    for got, want in zip((loss, ce, token), wanted):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    assert (token[::7] == 0).all() and not ce.requires_grad and not token.requires_grad
    scale = 0.37  # the trainer divides by its count of labelled tokens
    grads = torch.autograd.grad(scale * loss, (x, weight))
    for got, want in zip(grads, torch.autograd.grad(scale * wanted[0], (x, weight))):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_z_loss_pulls_on_the_partition_function(case):
    x, weight, labels = case
    without, with_z = (linear_cross_entropy(x, weight, labels, LossConfig(z_loss=z)) for z in (0.0, 0.01))
    penalty = (x @ weight.T).logsumexp(-1).square()[labels != -100].sum()
    torch.testing.assert_close(with_z.loss - without.loss, 0.01 * penalty, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_z.ce, without.ce)


def test_no_label_at_all(case):
    x, weight, labels = case
    loss, ce, _ = linear_cross_entropy(x, weight, torch.full_like(labels, -100), LossConfig(z_loss=0.1, chunk_size=8))
    assert loss == 0 and ce == 0
    loss.backward()
    assert not x.grad.any() and not weight.grad.any()


def test_large_logits_stay_finite(case):
    x, weight, labels = case
    loss, _, _ = linear_cross_entropy(1e4 * x, weight, labels, LossConfig(chunk_size=16))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), plain(1e4 * x, weight, labels)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_sums_in_fp32(autocast):
    torch.manual_seed(0)
    x, weight, labels = torch.randn(4000, 8), torch.randn(32, 8), torch.randint(0, 32, (4000,))
    wanted = plain(x.bfloat16().float(), weight.bfloat16().float(), labels)[0]
    if not autocast:
        x, weight = x.bfloat16(), weight.bfloat16()
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, ce, _ = linear_cross_entropy(x, weight, labels, LossConfig(chunk_size=512))
    assert loss.dtype == ce.dtype == torch.float32
    # Each logit is off by a bf16 rounding; their sum would be off by parts in a hundred if added up in bf16.
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=0)
    loss.backward()
    assert x.grad.dtype == x.dtype and weight.grad.dtype == weight.dtype


def test_evaluation_works_out_no_gradient(case, monkeypatch):
    x, weight, labels = case
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # what accumulates the weight's gradient
    with torch.no_grad():
        loss, _, token = linear_cross_entropy(x, weight, labels, LossConfig(chunk_size=8), per_token=True)
    assert not loss.requires_grad
    torch.testing.assert_close(token.double(), plain(x, weight, labels)[2], rtol=1e-5, atol=1e-5)


def test_an_explicit_choice_that_cannot_be_had_raises(case, caplog):
    with pytest.raises(ValueError, match="loss.impl='liger' cannot be had: the tensors are on cpu.*'torch' or 'auto'"):
        linear_cross_entropy(*case, LossConfig(impl="liger"))
    assert resolve_impl("torch", torch.device("cuda")) == "torch"
    with caplog.at_level(logging.INFO):
        assert resolve_impl("auto", torch.device("cpu")) == "torch"
    assert resolve_impl("auto", torch.device("cuda")) == "compiled"


def test_the_chunk_follows_from_implementation_and_vocabulary():
    assert chunk_size(LossConfig(), 32768, "torch") == 1024
    assert chunk_size(LossConfig(), 32768, "compiled") == 8192
    assert chunk_size(LossConfig(), 2**28, "compiled") == 128
    assert chunk_size(LossConfig(chunk_size=7), 32768, "compiled") == 7


@pytest.mark.gpu
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_equals_torch(dtype, z_loss, per_token):
    torch.manual_seed(0)
    n, d, v = 1000, 256, 5003
    x = torch.randn(n, d, device="cuda", dtype=dtype)
    weight = (0.1 * torch.randn(v, d, device="cuda")).to(dtype)
    labels = torch.randint(0, v, (n,), device="cuda")
    labels[::9] = -100
    results = []
    for impl in ("torch", "liger"):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_cross_entropy(a, w, labels, LossConfig(impl=impl, z_loss=z_loss), per_token)
        (out.loss / 7).backward()
        results.append((out, a.grad, w.grad))
    (a, *grads), (b, *others) = results
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(a.loss, b.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(a.ce, b.ce, rtol=tolerance, atol=0)
    assert (a.token is None) == (b.token is None) == (not per_token)
    for g, o in zip(grads, others):
        assert (g - o).float().norm() < 10 * tolerance * g.float().norm()


@pytest.mark.parametrize("compiler", ["none", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_chunk_that_is_compiled(case, z_loss, compiler, monkeypatch):
    if compiler == "none":
        monkeypatch.setattr(loss_module, "_compiled_chunk", lambda: loss_module._chunk_in_one_pass)
    x, weight, labels = case
    config = LossConfig(chunk_size=16, z_loss=z_loss, impl="compiled")
    loss, ce, token = linear_cross_entropy(x, weight, labels, config, per_token=True)
    wanted = plain(x, weight, labels, z_loss)
    for got, want in zip((loss, ce, token), wanted):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    for got, want in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(wanted[0], (x, weight))):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
