"""Steps of one token a sequence: the Triton decode kernels against the whole forward, and replayed graphs."""

import os

import pytest
import torch

from sieve.eval.config import Sampling
from sieve.eval.generate import complete
from sieve.kernels.nsa.layout import Packing
from sieve.model import mlp, projection, rope
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
    """Prefill to before l, w and n * l', then a token at a time past them, in a batch of mixed lengths; every kernel that a
    GPU's step has."""
    pytest.importorskip("triton")
    from sieve.kernels.nsa import decode_triton

    made, calls, original = decoder(impl="reference", qk_norm=True), [], decode_triton.nsa_decode
    monkeypatch.setattr(decode_triton, "nsa_decode", lambda *a, **k: calls.append(1) or original(*a, **k))
    tokens = texts(14, 20, 70, 90)
    want = [made.logits(t[None], pack([len(t)]))[0] for t in tokens]
    cache = made.new_cache(4, 90)
    made.extend(torch.cat([t[:-8] for t in tokens]), [len(t) - 8 for t in tokens], cache)
    for module in (projection, mlp):
        monkeypatch.setattr(module, "one_launch", lambda x: calls.append(2) or True)
    monkeypatch.setattr(rope, "_in_one_launch", lambda xs: True)
    for layer, own in zip(made.layers, cache.layers):
        layer.attention.impl, own.kernels = "triton", True
    step = Step(made, cache)
    for back in range(8, 0, -1):
        got = step(torch.stack([t[-back] for t in tokens]))
        for row, whole in zip(got, want):
            torch.testing.assert_close(row, whole[-back], rtol=1e-4, atol=2e-5)
    assert calls.count(1) == 16 and calls.count(2) == 32


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for the interpreter on a CPU; a GPU's own tests are below"
)
@pytest.mark.parametrize("share_kv", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_triton_chunks_equal_the_whole_forward(model, attention, build, pack, share_kv):
    """Several tokens at a time, of some sequences none: training's kernels over the cache, and their choices to the bit."""
    pytest.importorskip("triton")
    from sieve.scripts.check_selection import watched

    sizes = model(num_layers=1, moe=None, num_heads=2, num_kv_heads=1, head_dim_qk=16, head_dim_v=16, init_std=0.3)
    made = build(sizes, attention(impl="triton", share_kv=share_kv, topk=3, local_blocks=1)).requires_grad_(False)
    tokens, want, chosen = texts(60, 35), [], []
    for t in tokens:
        with watched(made) as found:
            want.append(made.logits(t[None], pack([len(t)]))[0])
        chosen += found
    cache, done = made.new_cache(2, 60), [0, 0]
    for counts in ([9, 3], [4, 0], [30, 15], [17, 17]):
        new = torch.cat([t[n : n + count] for t, n, count in zip(tokens, done, counts)])
        with watched(made) as found:
            logits = made.extend(new, counts, cache, every=True)
        for whole, choice, n, got, indices in zip(want, chosen, done, logits.split(counts), found[0].split(counts)):
            torch.testing.assert_close(got, whole[n : n + len(got)], rtol=1e-4, atol=2e-5)
            assert torch.equal(indices, choice[n : n + len(got)])
        done = [n + count for n, count in zip(done, counts)]
    assert (chosen[0][40] != chosen[0][59]).any()


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
@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": True, "phi_hidden": 40}, {"phi": "linear", "compressed_rope": False}, {"phi": "mean"}, {"share_kv": True},
    {"kernel_size": 16, "kernel_stride": 4}, {"type": "full"}, {"type": "window"},
], ids=str)  # fmt: skip
def test_steps_on_a_gpu_equal_the_whole_forward(decoder, changes, monkeypatch):
    """Prefixes before and at the ends of blocks, in fp32; each layer's projections are one launch, and so are rotations."""
    from sieve.kernels.common import project_triton, rope_triton

    calls = []
    for module, name in ((project_triton, "project"), (project_triton, "swiglu"), (rope_triton, "rotate")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    made, tokens = decoder("cuda", **changes), [t.cuda() for t in texts(30, 36, 87, 110)]
    ends = [torch.tensor([0, len(t)], dtype=torch.int32, device="cuda") for t in tokens]
    want = [made.logits(t[None], Packing.of(end, len(t), len(t)))[0] for t, end in zip(tokens, ends)]
    cache = made.new_cache(4, 110)
    made.extend(torch.cat([t[:7] for t in tokens]), [7] * 4, cache)
    made.extend(torch.cat([t[7:-20] for t in tokens]), [len(t) - 27 for t in tokens], cache)
    step = Step(made, cache)
    for back in range(20, 0, -1):
        calls.clear()
        got = step(torch.stack([t[-back] for t in tokens]))
        for row, whole in zip(got, want):
            torch.testing.assert_close(row, whole[-back], rtol=5e-4, atol=1e-4)
        assert calls.count("project") == calls.count("swiglu") == 2 <= calls.count("rotate")


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
