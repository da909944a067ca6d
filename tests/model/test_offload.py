"""Layers' inputs that wait on the host: the same numbers, and only the inputs."""

import gc
import itertools

import pytest
import torch

from sieve.kernels.nsa.layout import Packing
from sieve.model.offload import Offload

T = 64


def run(decoder, lengths=(40, 24)):
    """Loss and gradients of a micro-batch, which goes to the model's device without waiting."""
    generator, device = torch.Generator().manual_seed(0), decoder.embed.weight.device

    def there(x):
        return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)

    tokens, labels = (there(torch.randint(0, 61, (1, sum(lengths)), generator=generator)) for _ in range(2))
    ends = there(torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32))
    decoder.zero_grad()
    loss = decoder(tokens, labels, Packing.of(ends, sum(lengths), max(lengths))).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def free(decoder):
    gc.collect()
    return [buffer for found in decoder._offload.free.values() for buffer, _ in found]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["attention", "block", "full"])
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_numbers_are_the_same(kind, mode, compiled, model, attention, build):
    torch._dynamo.reset()
    decoder = build(model(num_layers=3, moe=None), attention(kind))
    decoder.set_activation_checkpointing(mode)
    if compiled:
        decoder.compile_layers(backend="aot_eager", fullgraph=False)
    loss, grads = run(decoder)
    decoder.set_activation_checkpointing(mode, offload=True)
    for _ in range(2):
        again, others = run(decoder)
        assert torch.equal(again, loss)
        assert others.keys() == grads.keys() and all(torch.equal(others[name], grad) for name, grad in grads.items())
    buffers = free(decoder)  # one a layer, used again in the second step
    assert [b.shape for b in buffers] == 3 * [(T, decoder.config.hidden_size)]
    torch._dynamo.reset()


def test_a_buffer_is_not_used_again_while_a_graph_needs_it(model, attention, build, pack):
    decoder = build(model(num_layers=2, moe=None), attention("full"))
    decoder.set_activation_checkpointing("block", offload=True)
    tokens = torch.arange(T)[None] % 61
    first, second = (decoder(tokens, tokens.roll(k, 1), pack([T])).loss_sum for k in (1, 2))
    assert not free(decoder)
    a = torch.autograd.grad(first, decoder.embed.weight, retain_graph=True)[0]
    assert not free(decoder)
    b = torch.autograd.grad(second, decoder.embed.weight)[0]
    assert len(free(decoder)) == 2
    again = torch.autograd.grad(first, decoder.embed.weight)[0]
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert len(free(decoder)) == 4


def test_only_the_input_goes():
    offload, packed = Offload(torch.device("cpu")), []
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    offload.buffer = lambda saved: packed.append(saved) or torch.empty(saved.shape)
    with offload.keep(x):
        y = ((x @ weight).exp() * x).sum()
    grads = torch.autograd.grad(y, (x, weight))
    assert len(packed) == 1 and packed[0].data_ptr() == x.data_ptr()
    for got, want in zip(grads, torch.autograd.grad(((x @ weight).exp() * x).sum(), (x, weight))):
        assert torch.equal(got, want)


def test_nothing_is_kept_where_no_gradient_is_wanted(model, attention, build, pack):
    decoder = build(model(num_layers=2, moe=None), attention("full"))
    decoder.set_activation_checkpointing("block", offload=True)
    with torch.no_grad():
        decoder(torch.zeros(1, T, dtype=torch.int64), torch.zeros(1, T, dtype=torch.int64), pack([T]))
    assert decoder._offload is None


def test_without_checkpointing_it_is_refused(model, attention, build):
    with pytest.raises(ValueError, match="attention, block or full"):
        build(model(), attention("full")).set_activation_checkpointing("none", offload=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_frees_memory_and_waits_for_nothing(compiled, model, attention, build):
    layers, hidden, lengths = 12, 512, (9000, 7384)
    decoder = build(
        model(num_layers=layers, hidden_size=hidden, num_heads=8, num_kv_heads=2, head_dim_qk=64, head_dim_v=64,
              intermediate_size=1024, moe=None),
        attention("nsa", block_size=64, kernel_size=32, kernel_stride=16, topk=16, window_size=512),
    ).to("cuda", torch.bfloat16)
    if compiled:
        decoder.compile_layers()
    peaks, found = [], []
    for offload in (False, True):
        decoder.set_activation_checkpointing("block", offload=offload)
        for _ in range(2):
            run(decoder, lengths)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found.append(run(decoder, lengths))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    x = sum(lengths) * hidden * 2
    (loss, grads), (again, others) = found
    assert torch.equal(loss, again) and all(torch.equal(grads[name], others[name]) for name in grads)
    assert peaks[0] - peaks[1] > (layers - 5) * x  # some are on their way
