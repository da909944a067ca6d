"""Decoding with a cache against the forward without: every position, any chunking, mixed lengths, every attention type."""

import pytest
import torch

from sieve.model import nsa as nsa_module
from sieve.model.config import AttentionConfig, ModelConfig

TYPES = {
    "full": dict(type="full"),
    "full-options": dict(type="full", qk_norm=True, output_gate=True),
    "window": dict(type="window"),
    "nsa": dict(type="nsa"),
    "nsa-shared": dict(type="nsa", share_kv=True, qk_norm=True),
    "nsa-mean": dict(type="nsa", phi="mean", compressed_rope=False),
    "nsa-linear": dict(type="nsa", phi="linear", kernel_size=8, kernel_stride=8, block_size=8),
    "mixed": dict(type="nsa", layers=("full", "nsa", "window", "nsa")),
}
# l = 8, d = 4, l' = 16, w = 12, n = 4: one less, equal and one more, and what lies around n * l'.
BOUNDARIES = [1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81]


@pytest.fixture(params=list(TYPES))
def decoder(request, model, attention, build):
    changes = dict(TYPES[request.param])
    layers = 4 if "layers" in changes else 2
    return build(model(num_layers=layers), attention(changes.pop("type"), **changes))


@pytest.fixture
def whole(pack):
    """whole(decoder, tokens [L]): logits [L, vocab] without a cache."""

    def whole(decoder, tokens):
        with torch.no_grad():
            return decoder.logits(tokens[None], pack([len(tokens)]))[0]

    return whole


def texts(*lengths, vocab=61):
    rng = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, vocab, (n,), generator=rng) for n in lengths]


def run(decoder, tokens, sizes, cache=None):
    """Feed each text in chunks: sizes(done, left) new tokens at a time -> every text's logits, and the cache."""
    cache = cache or decoder.new_cache(len(tokens), max(map(len, tokens)))
    done, found = [0] * len(tokens), [[] for _ in tokens]
    while any(d < len(t) for d, t in zip(done, tokens)):
        counts = [min(sizes(d, len(t) - d), len(t) - d) for d, t in zip(done, tokens)]
        new = torch.cat([t[d : d + c] for t, d, c in zip(tokens, done, counts)])
        for own, part in zip(found, decoder.extend(new, counts, cache, every=True).split(counts)):
            own.append(part)
        done = [d + c for d, c in zip(done, counts)]
    return [torch.cat(own) for own in found], cache


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_every_boundary_then_token_by_token(decoder, whole):
    """A prefill of each length (in batches of mixed lengths), then one token at a time past the next boundaries."""
    tokens = texts(*[n + 20 for n in BOUNDARIES])
    want = [whole(decoder, t) for t in tokens]
    got, _ = run(decoder, tokens, lambda done, left: left - 20 if done == 0 and left > 20 else 1)
    for g, w in zip(got, want):
        close(g, w)


@pytest.mark.parametrize("size", [1, 7, 31])
def test_any_chunking(decoder, whole, size):
    tokens = texts(100, 33, 1, 71)
    got, _ = run(decoder, tokens, lambda done, left, size=size: size)
    for g, t in zip(got, tokens):
        close(g, whole(decoder, t))


def test_ragged_chunks(decoder, whole):
    """Every sequence at a pace of its own, none at all now and then."""
    tokens, rng = texts(130, 90, 41), torch.Generator().manual_seed(1)
    got, _ = run(decoder, tokens, lambda done, left: int(torch.randint(0, 20, (), generator=rng)) + (left > 100))
    for g, t in zip(got, tokens):
        close(g, whole(decoder, t))


def test_the_selection_is_training_s_to_the_bit(model, attention, build, pack, monkeypatch):
    """Whole model, random weights: each layer's chosen blocks, cached and not."""
    decoder = build(model(head_dim_qk=16), attention(impl="reference"))
    (tokens,) = texts(200)
    seen, cached = [], []
    plain, decode = nsa_module.nsa_attention, nsa_module.nsa_decode

    def keep(found, call):
        def called(*args, **kwargs):
            out = call(*args, **kwargs)
            found.append(out[1])
            return out
        return called

    monkeypatch.setattr(nsa_module, "nsa_attention", keep(seen, plain))
    with torch.no_grad():
        decoder.logits(tokens[None], pack([200]))
    want = list(seen)
    seen.clear()
    monkeypatch.setattr(nsa_module, "nsa_decode", keep(cached, decode))
    for size in (1, 9):
        seen.clear(), cached.clear()
        run(decoder, [tokens], lambda done, left, size=size: size)
        for layer in range(2):
            chunks = [seen[layer]] + [x[0] for x in cached[layer::2]]
            assert torch.equal(torch.cat(chunks), want[layer])
    free = want[0][150, 0]
    assert free.tolist() != list(range(6, 10)) and (free >= 0).all()


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("changes", [{}, {"share_kv": True, "qk_norm": True}, {"layers": ("full", "nsa")}], ids=str)
def test_within_dense_len_the_cache_is_dense(changes, size, model, attention, build, whole):
    decoder = build(model(), attention(dense_len=100, **changes))
    tokens = texts(100, 33, 1, 71)
    got, _ = run(decoder, tokens, lambda done, left: size)
    sparse = build(model(), attention(**changes))
    for g, t in zip(got, tokens):
        close(g, whole(decoder, t))
    assert not torch.allclose(got[0], whole(sparse, tokens[0]), rtol=1e-2, atol=1e-2)


def test_a_text_that_outgrows_dense_len_turns_sparse(model, attention, build, whole):
    """One layer, whose keys do not depend on how the tokens before attended: then each token is as in a forward of its
    own kind, and what the sparse branches read was stored while the layer was dense."""
    shape = model(num_layers=1)
    decoder, sparse = build(shape, attention(dense_len=60)), build(shape, attention())
    (tokens,) = texts(130)
    for size in (1, 7, 20):
        (got,), _ = run(decoder, [tokens], lambda done, left, size=size: size)
        turn = 60 // size * size
        close(got[:turn], whole(decoder, tokens[:60])[:turn])
        close(got[turn:], whole(sparse, tokens)[turn:])


def test_a_prompt_longer_than_dense_len_is_sparse_from_its_beginning(model, attention, build, whole):
    decoder = build(model(), attention(dense_len=60))
    tokens = texts(90, 20)
    (got, beside), _ = run(decoder, tokens, lambda done, left: 70 if done == 0 else 1)
    close(got, whole(decoder, tokens[0]))
    close(beside, whole(build(model(), attention()), tokens[1]))  # by call: the longest text decides for all


def test_growing_selecting_and_last_logits(decoder, whole):
    tokens = texts(60, 35, 48)
    cache = decoder.new_cache(3, 50)
    heads = [t[:-10] for t in tokens]
    last = decoder.extend(torch.cat(heads), [len(t) for t in heads], cache)
    for i, t in enumerate(heads):
        close(last[i], whole(decoder, t)[-1])
    with pytest.raises(ValueError, match=r"holds 50 tokens a sequence and 51 would be needed; call reserve\(51\)"):
        decoder.extend(torch.zeros(3, dtype=torch.int64), [1, 1, 1], cache)
    cache.reserve(64)
    cache.select([2, 0, 0])
    assert cache.lengths.tolist() == [38, 50, 50] and cache.batch == 3
    tails = [tokens[2][-10:], tokens[0][-10:], tokens[0][-10:].flip(0)]
    got = decoder.extend(torch.cat(tails), [10] * 3, cache, every=True).split(10)
    for g, head, tail in zip(got, (heads[2], heads[0], heads[0]), tails):
        close(g, whole(decoder, torch.cat([head, tail]))[-10:])


def test_users_mistakes(model, attention, build):
    decoder = build(model(), attention())
    cache = decoder.new_cache(2, 10)
    tokens = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"counts=\[1, 1\] add up to 2, tokens \[3\] has 3"):
        decoder.extend(tokens, [1, 1], cache)
    last = decoder.extend(tokens, [3, 0], cache)
    assert last[0].isfinite().all() and last[1].isnan().all()
    with pytest.raises(ValueError, match="give the number of new tokens of each of the 2 sequences"):
        decoder.extend(tokens, [3], cache)
    with pytest.raises(ValueError, match="batch=0 and capacity=5 must be at least 1"):
        decoder.new_cache(0, 5)


def kv_set(config, batch, tokens):
    """Bytes of one fp32 K and V of every token and layer."""
    return 4 * batch * tokens * config.num_layers * config.num_kv_heads * (config.head_dim_qk + config.head_dim_v)


@pytest.mark.parametrize("tokens", [8192, 65536])
def test_bytes_against_the_formula(tokens):
    """The paper's geometry: T full entries, T/d compressed ones, l raw tokens and w of the window."""
    from sieve.model.cache import Cache

    config = ModelConfig(name="c", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim_qk=24,
                         head_dim_v=16, intermediate_size=64)
    cache = Cache(config, AttentionConfig(), 2, tokens)
    one = kv_set(config, 2, tokens)
    entries = tokens + tokens // 16 + 32 + 512
    spare = 16  # compressed places up to a whole tile, one of them for what is no block yet
    assert cache.bytes() == one // tokens * (entries + spare)
    if tokens == 65536:
        assert 1.0625 <= cache.bytes() / one < 1.0715
    full = Cache(config, AttentionConfig(type="full"), 2, tokens)
    assert full.bytes() == one
    window = Cache(config, AttentionConfig(type="window"), 2, tokens)
    assert window.bytes() == one // tokens * 512


def test_bf16(model, attention, build, pack):
    """Cached and whole agree as well as bf16 allows: no worse than twice the whole's own error."""
    exact = build(model(moe=None), attention())
    (tokens,) = texts(120)
    with torch.no_grad():
        want = exact.logits(tokens[None], pack([120]))[0]
        rough = exact.bfloat16()
        plain = rough.logits(tokens[None], pack([120]))[0].float()
    (got,), cache = run(rough, [tokens], lambda done, left: 30 if done == 0 else 1)
    assert cache.layers[0]["k_slc"].dtype == torch.bfloat16
    assert (got.float() - want).norm() < 2 * (plain - want).norm()
