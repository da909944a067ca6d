"""What a query must not feel, to the last bit: later tokens, and other documents. Raw tokens go in, through phi."""

import pytest
import torch

from sieve.kernels.nsa import reference, sdpa
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import CompressedSlots
from sieve.kernels.nsa.phi import PhiWeights, compress

GEOMETRY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=24)
LENGTHS = [37, 0, 1, 300, 38, 36, 64]
D, HEADS, KV_HEADS = 8, 4, 2
IMPLEMENTATIONS = {"reference": reference.nsa_attention, "sdpa": sdpa.nsa_attention}
impls = pytest.mark.parametrize("nsa_attention", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture
def operator(packed):
    packing = packed(LENGTHS)
    slots = CompressedSlots.of(packing, GEOMETRY.kernel_size, GEOMETRY.kernel_stride)
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(16, 8 * D, generator=rng) / 8, torch.randn(D, 16, generator=rng) / 4
    phi = PhiWeights("mlp", position=torch.randn(8, D, generator=rng), w_in=w[0], w_out=w[1])

    def run(nsa_attention, x):
        """x [T, HEADS + 7 * KV_HEADS, D] raw tokens -> out, indices."""
        q, *kv = x.split([HEADS] + [KV_HEADS] * 7, 1)
        k_cmp, v_cmp = (compress(y, slots, GEOMETRY, phi) for y in kv[:2])
        gates = kv[6].reshape(-1, HEADS, D // 2)[..., :3].sigmoid()
        return nsa_attention(q, k_cmp, v_cmp, *kv[2:6], gates, packing, GEOMETRY, scale=D**-0.5)

    run.x = torch.randn(sum(LENGTHS), HEADS + 7 * KV_HEADS, D, generator=rng)
    run.packing = packing
    return run


@impls
@pytest.mark.parametrize("position", [0, 6, 7, 8, 15, 16, 100, 255, 256, 299])
def test_later_tokens_change_no_bit(operator, nsa_attention, position):
    first = sum(LENGTHS[:3])
    changed = operator.x.clone()
    changed[first + position + 1 : first + 300] = 3 * torch.randn(299 - position, *changed.shape[1:])
    before, after = operator(nsa_attention, operator.x), operator(nsa_attention, changed)
    same = torch.ones(len(changed), dtype=torch.bool)
    same[first + position + 1 : first + 300] = False
    for a, b in zip(before, after):
        assert torch.equal(a[same], b[same])
    if position < 299:
        assert not torch.equal(before[0], after[0])


@impls
def test_other_documents_change_no_bit(operator, nsa_attention):
    changed = operator.x.clone()
    changed[operator.packing.doc != 3] += 1.0
    mine = operator.packing.doc == 3
    for a, b in zip(operator(nsa_attention, operator.x), operator(nsa_attention, changed)):
        assert torch.equal(a[mine], b[mine])


@impls
@pytest.mark.parametrize("token", [0, 36, 37, 38, 150, 337, 338, 375, 376, 475])
def test_gradients_stay_in_the_past_of_the_document(operator, nsa_attention, token):
    x = operator.x.clone().requires_grad_()
    out, _ = operator(nsa_attention, x)
    (grad,) = torch.autograd.grad(out[token].sum(), x)
    doc, at = operator.packing.doc, torch.arange(len(x))
    allowed = (doc == doc[token]) & (at <= token)
    assert (grad[~allowed] == 0).all() and grad[token].abs().sum() > 0
