"""A step of one token a sequence stored by the Triton kernels: caches and logits to the bit as in plain PyTorch, and within
rounding where they compute phi too. The attention is PyTorch's: the head sizes here are none of its kernels'."""

import os

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa import cache_triton, phi_triton  # noqa: E402


def extended(decoder, tokens, lengths, steps, kernels):
    """The caches and logits after each of `steps` tokens that follow prefixes of those lengths."""
    device = decoder.embed.weight.device
    cache = decoder.new_cache(len(lengths), max(lengths) + steps)
    for layer in cache.layers:
        assert layer.kernels == (device.type == "cuda")
        layer.kernels = kernels
    decoder.extend(torch.cat([t[:n] for t, n in zip(tokens, lengths)]), lengths, cache)
    found = []
    for i in range(steps):
        new = torch.stack([t[n + i] for t, n in zip(tokens, lengths)])
        logits = decoder.extend(new, [1] * len(lengths), cache)
        found.append((logits, [{name: x.clone() for name, x in layer._tensors.items()} for layer in cache.layers]))
    return found


def texts(steps, device):
    """Lengths of prefixes, and the tokens of each and of `steps` more."""
    lengths, rng = [1, 2, 3, 7, 8, 11, 12, 40], torch.Generator().manual_seed(0)
    return lengths, [torch.randint(0, 61, (n + steps,), generator=rng).to(device) for n in lengths]


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.mark.parametrize("geometry", [
    {}, *(pytest.param(c, marks=pytest.mark.slow) for c in [{"kernel_size": 12, "window_size": 5}, {"kernel_size": 4}]),
], ids=str)  # fmt: skip
def test_caches_and_logits_are_the_same_to_the_bit(model, attention, build, device, geometry, monkeypatch):
    """Prefixes before and at the ends of blocks and of the window, shorter than a block, and longer than all of it.

    phi=mean is PyTorch's in both."""
    calls, original = [], cache_triton.store_token
    monkeypatch.setattr(cache_triton, "store_token", lambda *a: calls.append(1) or original(*a))
    decoder, steps = build(model(moe=None), attention(impl="reference", phi="mean", **geometry)).to(device), 14
    lengths, tokens = texts(steps, device)
    l, d = decoder.attention_config.kernel_size, decoder.attention_config.kernel_stride
    pairs = zip(extended(decoder, tokens, lengths, steps, False), extended(decoder, tokens, lengths, steps, True))
    for step, ((want, old), (got, new)) in enumerate(pairs):
        assert torch.equal(got, want), step
        for a, b in zip(old, new):
            for name, x in a.items():
                y = b[name]
                if name.endswith("cmp"):  # the last place takes what is no block, and is never looked at
                    x, y = x[:, :, :-1], y[:, :, :-1]
                if name.endswith("raw"):  # as far as the next block has begun
                    length = torch.tensor(lengths, device=device) + step + 1
                    begun = length - torch.div(length - l, d, rounding_mode="floor").add(1).clamp(min=0) * d
                    real = (torch.arange(l, device=device) < begun[:, None])[:, None, :, None]
                    x, y = x.where(real, 0.0), y.where(real, 0.0)
                assert torch.equal(x, y), (step, name)
    assert len(calls) == 2 * steps  # two layers


@pytest.mark.parametrize("changes", [
    pytest.param({}, marks=pytest.mark.slow), {"kernel_size": 12, "window_size": 5, "qk_norm": True},
    {"kernel_size": 4, "phi_hidden": 5, "compressed_rope": False}, {"phi": "linear", "qk_norm": True},
], ids=str)  # fmt: skip
def test_phi_in_the_kernels_is_the_same_within_rounding(model, attention, build, device, changes, monkeypatch):
    calls, original = [], phi_triton.compress_token
    monkeypatch.setattr(phi_triton, "compress_token", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setattr(cache_triton, "store_block", None)
    decoder = build(model(moe=None, init_std=0.3), attention(impl="reference", **changes)).to(device)
    steps = 5  # more than kernel_stride
    lengths, tokens = texts(steps, device)
    l, d = decoder.attention_config.kernel_size, decoder.attention_config.kernel_stride
    pairs = zip(extended(decoder, tokens, lengths, steps, False), extended(decoder, tokens, lengths, steps, True))
    for step, ((want, old), (got, new)) in enumerate(pairs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        for a, b in zip(old, new):
            for name in ("k_cmp", "v_cmp"):
                blocks = [max((n + step + 1 - l) // d + 1, 0) for n in lengths]
                for row, count in enumerate(blocks):
                    torch.testing.assert_close(b[name][row, :, :count], a[name][row, :, :count], rtol=1e-4, atol=2e-5)
                    assert not b[name][row, :, count:-1].any()  # nothing is written before it is complete
    assert len(calls) == 2 * steps  # two layers


@pytest.mark.parametrize("counts", [[2, 2], [1, 0]], ids=str)
def test_other_chunks_are_stored_as_before(model, attention, build, device, counts, monkeypatch):
    monkeypatch.setattr(cache_triton, "store_token", None)
    monkeypatch.setattr(phi_triton, "compress_token", None)
    decoder = build(model(moe=None), attention(impl="reference")).to(device)
    cache = decoder.new_cache(2, 60)
    for layer in cache.layers:
        layer.kernels = True
    decoder.extend(torch.zeros(41, dtype=torch.int64, device=device), [40, 1], cache)
    decoder.extend(torch.zeros(sum(counts), dtype=torch.int64, device=device), counts, cache)
    shared = build(model(moe=None), attention(impl="reference", share_kv=True)).to(device)
    cache = shared.new_cache(1, 60)
    for layer in cache.layers:
        layer.kernels = True
    for count in (40, 1):
        shared.extend(torch.zeros(count, dtype=torch.int64, device=device), [count], cache)
