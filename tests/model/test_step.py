"""Steps of one token a sequence: the Triton decode kernels against the whole forward, and replayed graphs."""

import os

import pytest
import torch

from sieve.eval.config import Sampling
from sieve.eval.generate import complete
from sieve.model.step import Step, why_not_graph


@pytest.fixture
def decoder(model, attention, build):
    """decoder(**attention): two dense layers, head sizes that the kernels have."""

    def make(device="cpu", dtype=torch.float32, moe=None, **changes):
        sizes = model(moe=moe, head_dim_qk=32, head_dim_v=16, init_std=0.3)
        built = build(sizes, attention(changes.pop("type", "nsa"), **changes))
        return built.to(device, dtype).eval().requires_grad_(False)

    return make


def texts(*lengths):
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 61, (n,), generator=rng) for n in lengths]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for the interpreter on a CPU; a GPU's own tests are below"
)
def test_triton_decoding_equals_the_whole_forward(decoder, pack, monkeypatch):
    """Prefill to before l, w and n * l', then a token at a time past them, in a batch of mixed lengths."""
    pytest.importorskip("triton")
    from sieve.kernels.nsa import decode_triton

    made, calls, original = decoder(impl="reference"), [], decode_triton.nsa_decode
    monkeypatch.setattr(decode_triton, "nsa_decode", lambda *a, **k: calls.append(1) or original(*a, **k))
    tokens = texts(14, 20, 70, 90)
    want = [made.logits(t[None], pack([len(t)]))[0] for t in tokens]
    cache = made.new_cache(4, 90)
    made.extend(torch.cat([t[:-8] for t in tokens]), [len(t) - 8 for t in tokens], cache)
    for layer in made.layers:
        layer.attention.impl = "triton"
    step = Step(made, cache)
    for back in range(8, 0, -1):
        got = step(torch.stack([t[-back] for t in tokens]))
        for row, whole in zip(got, want):
            torch.testing.assert_close(row, whole[-back], rtol=1e-4, atol=2e-5)
    assert len(calls) == 16


def test_a_bounded_step_equals_a_plain_one(decoder):
    """With the capacity in place of the longest length, as a graph is captured; the host's count is the caller's."""
    made, tokens = decoder(), texts(50, 21)
    plain, bounded = (made.new_cache(2, 200) for _ in range(2))
    for cache in (plain, bounded):
        made.extend(torch.cat(tokens), [50, 21], cache)
    for token in texts(4)[0]:
        new = token.repeat(2)
        want = made.extend(new, [1, 1], plain)
        got = made.extend(new, [1, 1], bounded, bounded=True)
        bounded.count([1, 1])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert bounded.longest == plain.longest == 54 and torch.equal(bounded.lengths, plain.lengths)


def test_there_is_no_graph_on_a_cpu(decoder):
    made = decoder()
    assert why_not_graph(made, made.new_cache(1, 10)) == "the model is on cpu"
    with pytest.raises(ValueError, match="graph=True cannot be had: the model is on cpu; use graph=False"):
        Step(made, made.new_cache(1, 10), graph=True)


@pytest.mark.gpu
def test_why_there_is_no_graph_on_a_gpu(decoder, moe):
    for changes, reason in (
        ({"impl": "reference"}, "attention.impl=reference"), ({"impl": "sdpa"}, "attention.impl=sdpa"),
        ({"dense_len": 5}, "texts are dense up to 5 tokens"),
        ({"moe": moe()}, "experts"),
    ):  # fmt: skip
        made = decoder("cuda", **changes)
        assert reason in why_not_graph(made, made.new_cache(1, 10))
    made = decoder("cuda", dense_len=10)
    assert why_not_graph(made, made.new_cache(1, 10)) is None  # dense to the end


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nsa", "full", "window", "shared", "mixed"])
def test_replayed_steps_equal_launched_ones(decoder, kind):
    """Past the ends of blocks and of the window; greedy texts of several lengths that end at different steps, too."""
    changes = {"shared": {"share_kv": True}, "mixed": {"layers": ("full", "nsa")}}.get(kind, {"type": kind})
    made, tokens = decoder("cuda", **changes), [t.cuda() for t in texts(50, 9)]
    caches = [made.new_cache(2, 120) for _ in range(2)]
    for cache in caches:
        made.extend(torch.cat(tokens), [50, 9], cache)
    steps = [Step(made, cache, graph=graph) for cache, graph in zip(caches, (False, True))]
    assert why_not_graph(made, caches[1]) is None
    for token in texts(60)[0].cuda():
        want, got = (step(token.repeat(2)) for step in steps)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert steps[1]._captured is not None and torch.equal(caches[0].lengths, caches[1].lengths)
    with pytest.raises(ValueError, match="the cache holds 120 tokens"):
        for _ in range(20):  # 50 + 60 + 10 fill it
            steps[1](token.repeat(2))
    prompts, sampling = [t.tolist() for t in texts(40, 7, 90)], Sampling(max_tokens=80)
    plain, graph = (complete(made, prompts, sampling, stop_ids=[3, 11, 40], graph=graph) for graph in (False, True))
    assert plain == graph
