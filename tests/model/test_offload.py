"""Layers' inputs in host memory: only they, in buffers used again, with equal results."""

import pytest
import torch

from sieve.model.offload import Offload

LENGTHS = [20, 12]


def gradients(decoder, pack, seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 61, (1, sum(lengths)), generator=generator) for _ in range(2))
    decoder.zero_grad()
    loss = decoder(tokens, labels, pack(lengths)).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("mode", ["attention", "block", "full"])
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_bit_equal_and_only_inputs(kind, mode, model, attention, build, pack):
    decoder = build(model(num_layers=3, moe=None), attention(kind))
    decoder.set_activation_checkpointing(mode)
    wanted = [gradients(decoder, pack, seed) for seed in range(3)]
    decoder.set_activation_checkpointing(mode, offload=True)
    for step in range(3):
        loss, grads = gradients(decoder, pack, step)
        assert torch.equal(loss, wanted[step][0])
        assert all(torch.equal(grad, wanted[step][1][name]) for name, grad in grads.items())
        offload = decoder.offload
        assert offload.packed == 3 * (step + 1)
        assert offload.bytes == offload.packed * sum(LENGTHS) * 32 * 4
        assert offload.fetched == 2 * (step + 1)  # the last layer's is still there
        assert offload.buffers == 3
    with torch.no_grad():
        decoder.logits(torch.zeros(1, 32, dtype=torch.int64), pack(LENGTHS))
    assert offload.packed == 9


def test_rows_of_another_length_and_a_forward_without_backward(model, attention, build, pack):
    decoder = build(model(), attention())
    decoder.set_activation_checkpointing("block")
    wanted = gradients(decoder, pack, lengths=[50, 14])
    decoder.set_activation_checkpointing("block", offload=True)
    gradients(decoder, pack)
    decoder(*torch.zeros(2, 1, 32, dtype=torch.int64), pack(LENGTHS))
    loss, grads = gradients(decoder, pack, lengths=[50, 14])
    assert torch.equal(loss, wanted[0]) and all(torch.equal(g, wanted[1][n]) for n, g in grads.items())
    assert decoder.offload.buffers == 4


def test_a_graph_may_be_gone_through_twice():
    offload, x, weight = Offload(), torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    with offload.of(x):
        loss = (x @ weight).square().sum()
    first, = torch.autograd.grad(loss, weight, retain_graph=True)
    second, = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second) and offload.packed == 1 and offload.fetched == 1


def test_needs_checkpointing(model, attention, build):
    with pytest.raises(ValueError, match="offload=True needs activation checkpointing attention, block or full"):
        build(model(), attention()).set_activation_checkpointing("none", offload=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_on_the_gpu(compiled):
    from sieve.kernels.nsa.layout import Packing
    from sieve.model.config import AttentionConfig, ModelConfig
    from sieve.model.decoder import Decoder
    from sieve.model.init import initialize

    layers, length, hidden = 12, 16384, 1024
    config = ModelConfig(
        name="gpu", num_layers=layers, hidden_size=hidden, num_heads=16, num_kv_heads=1, head_dim_qk=64, head_dim_v=64,
        intermediate_size=1024,
    )
    with torch.device("cuda"):
        decoder = Decoder(config, AttentionConfig(type="nsa"), 1000)
    initialize(decoder, 0)
    decoder.bfloat16()
    if compiled:
        decoder.compile_layers()
    ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    tokens = torch.randint(0, 1000, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found = []
    for offload in (False, True):
        decoder.set_activation_checkpointing("block", offload=offload)
        for _ in range(3):
            decoder.zero_grad(set_to_none=False)  # gradients that come one by one would move the peak to the end
            torch.cuda.reset_peak_memory_stats()
            out = decoder(tokens, tokens, Packing.of(ends, length, length))
            out.loss_sum.backward()
        torch.cuda.synchronize()
        grads = [p.grad.clone() for p in decoder.parameters()]
        found.append((torch.cuda.max_memory_allocated(), out.loss_sum.detach(), grads))
        if not offload:
            grads[:] = [g.cpu() for g in grads]  # not to count in the second's peak
        del out
    (plain, loss, grads), (less, again, others) = found
    assert torch.equal(loss, again) and all(torch.equal(a, b.cpu()) for a, b in zip(grads, others))
    assert plain - less > (layers - 4) * length * hidden * 2
    assert decoder.offload.buffers == layers
