"""What follows a run's phases in the model: the rotary embedding, and padding that changes nothing else."""

import pytest
import torch

from sieve.model.config import RopeConfig, RopeScaling

YARN = RopeConfig(scaling=RopeScaling(factor=4.0, original_seq_len=16))


@pytest.mark.parametrize("kind", ["full", "window", "nsa"])
def test_set_rope_makes_the_model_that_was_built_with_it(kind, model, attention, build, pack):
    changed, plain = build(model(), attention(kind)), build(model(), attention(kind))
    stretched = build(model(rope=YARN), attention(kind))
    tokens, packing = torch.arange(60)[None], pack([60])
    before = changed.logits(tokens, packing)
    changed.set_rope(YARN)
    assert torch.equal(changed.logits(tokens, packing), stretched.logits(tokens, packing))
    assert not torch.equal(before, changed.logits(tokens, packing))
    changed.set_rope(RopeConfig())
    assert torch.equal(changed.logits(tokens, packing), plain.logits(tokens, packing))


@pytest.mark.parametrize("balance", ["bias", "aux"])
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_padding_changes_neither_losses_nor_gradients_nor_the_balance(kind, balance, model, moe, attention, build, pack):
    torch.manual_seed(0)
    lengths, padding = [50, 23], [64, 64, 9]
    real, empty = sum(lengths), sum(padding)
    tokens = torch.randint(61, (1, real))
    labels = torch.randint(61, (1, real))
    found = []
    for padded in (False, True):
        decoder = build(model(moe=moe(balance=balance)), attention(kind))
        row = [torch.cat([x, torch.full((1, empty), fill)], 1) if padded else x for x, fill in ((tokens, 0), (labels, -100))]
        mask = (torch.arange(real + empty) >= real)[None] if padded else None
        out = decoder(*row, pack(lengths + padding * padded), padding=mask)
        out.loss_sum.backward()
        found.append((out, {name: p.grad for name, p in decoder.named_parameters()}))
    (whole, grads), (padded, padded_grads) = found
    torch.testing.assert_close(padded.loss_sum, whole.loss_sum)
    torch.testing.assert_close(padded.ce_sum, whole.ce_sum)
    assert {i: load.tolist() for i, load in padded.expert_load.items()} == {
        i: load.tolist() for i, load in whole.expert_load.items()
    }
    for name, grad in grads.items():
        torch.testing.assert_close(padded_grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
