"""Generation: equal to a loop without cache; stop ids and strings; streaming loses and invents no character."""

import pytest
import torch

from sieve.eval.config import Sampling
from sieve.eval.generate import TextStream, complete, free_bytes, generate_text
from sieve.eval.sampling import Sampler
from sieve.kernels.nsa.layout import Packing


def prompts(*lengths, vocab=61):
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def loop(model, prompt, sampling, row, stop_ids=()):
    """The plain way: the whole text through the model for every token."""
    sampler, tokens = Sampler(sampling, row), list(prompt)
    for _ in range(sampling.max_tokens):
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        logits = model.logits(torch.tensor([tokens]), Packing.of(ends, len(tokens), len(tokens)))
        tokens.append(sampler(logits[0, -1]))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["full", "window", "nsa"])
@pytest.mark.parametrize("sampling", [
    Sampling(max_tokens=30), Sampling(max_tokens=30, temperature=1.3, top_p=0.9, seed=4),
], ids=["greedy", "drawn"])
def test_equals_a_loop_without_cache(tiny, kind, sampling):
    model, texts = tiny(kind), prompts(70, 1, 33)
    want = [loop(model, p, sampling, row) for row, p in enumerate(texts)]
    assert len({tuple(w) for w in want}) == 3
    assert complete(model, texts, sampling) == want
    assert complete(model, texts, sampling, prefill=9) == want


def test_stop_ids_end_each_text_by_itself(tiny):
    model, texts, sampling = tiny(), prompts(40, 20, 9), Sampling(max_tokens=25, temperature=1.0)
    free = [loop(model, p, sampling, row) for row, p in enumerate(texts)]
    stop = {free[0][3], free[2][11]}
    want = [loop(model, p, sampling, row, stop) for row, p in enumerate(texts)]
    assert len({len(w) for w in want}) > 1
    assert complete(model, texts, sampling, stop_ids=stop) == want


def test_sampling_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert Sampler(Sampling(), 0)(torch.tensor([1.0, 2.0, 2.0])) == 1
    draw = Sampler(Sampling(temperature=1.0, top_p=0.8), 0)
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(1000)]), minlength=4)
    # 0.5 and 0.3 reach 0.8: nothing else is drawn, these two as 5 to 3.
    assert counts[2:].sum() == 0 and abs(counts[0] / 1000 - 0.625) < 0.05
    with pytest.raises(ValueError, match="logits are nan"):
        draw(torch.tensor([0.0, torch.nan]))
    cold = Sampler(Sampling(temperature=0.5), 0)
    counts = torch.bincount(torch.tensor([cold(logits) for _ in range(1000)]), minlength=4) / 1000
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365, rtol=0, atol=0.05)


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-6])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    for logits in (torch.tensor([-7.0, 30.0, 29.0, -torch.inf]), torch.tensor([-300.0, -1.0, -2.0])):
        assert Sampler(Sampling(temperature=temperature), 0)(logits) == 1


def letters(ids):
    """Ids as bytes of UTF-8, as byte fallback has them."""
    return bytes(ids).decode(errors="replace")


def test_characters_come_whole():
    text, stream = "a\u20ac\u00e4b\U0001f600!", TextStream(letters)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces) and pieces[0] == "a" and pieces[1:3] == ["", ""]
    broken = TextStream(letters)
    assert [broken.push(0xE2), broken.push(0x82), broken.finish()] == ["", "", "\ufffd"]


@pytest.mark.parametrize("text, stop, want", [
    ("one. two", ["."], "one"), ("aab", ["ab"], "a"), ("abac", ["abad", "ac"], "ab"), ("xyz", ["zz"], "xyz"),
    ("a\n\nb", ["\n\n"], "a"), ("stop", ["stop", "top"], ""),
])
def test_stop_strings(text, stop, want):
    stream = TextStream(letters, stop)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == want
    assert stream.stopped == (want != text)


def test_text_in_text_out(tiny):
    model = tiny(vocab=256)
    sampling = Sampling(max_tokens=30, temperature=2.0)
    encode = lambda text: list(text.encode())  # noqa: E731
    (free,) = generate_text(model, encode, letters, ["hello"], sampling)
    stop = free[10:12]
    shown = []
    cut = generate_text(
        model, encode, letters, ["hello", "other"], sampling, stop=[stop], show=lambda row, piece: shown.append((row, piece))
    )
    assert cut[0] == free[: free.index(stop)]
    for row in range(2):
        assert "".join(piece for r, piece in shown if r == row) == cut[row]


def test_users_mistakes(tiny):
    with pytest.raises(ValueError, match=r"prompts \[1\] have no token"):
        complete(tiny(), [[1], []], Sampling())
    with pytest.raises(ValueError, match="no prompt is given"):
        complete(tiny(), [], Sampling())
    with pytest.raises(ValueError, match="stop='' is in every text"):
        TextStream(letters, [""])


@pytest.mark.parametrize("kind", ["full", "window", "nsa"])
def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(tiny, kind, monkeypatch):
    model, texts = tiny(kind), prompts(70, 9)
    needed = model.new_cache(2, 100).bytes()
    assert model.cache_bytes(2, 100) == needed
    monkeypatch.setattr("sieve.eval.generate.free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"max_tokens=30 for 2 texts .* cache of 0.00 GB, and 0.00 GB of memory are free"):
        complete(model, texts, Sampling(max_tokens=30))
    monkeypatch.setattr("sieve.eval.generate.free_bytes", lambda device: needed)
    assert [len(new) for new in complete(model, texts, Sampling(max_tokens=30))] == [30, 30]


def test_more_tokens_than_any_memory_holds(tiny):
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
    for max_tokens in (10**11, 10**30):
        with pytest.raises(ValueError, match=f"max_tokens={max_tokens} for 1 texts"):
            complete(tiny("full"), prompts(5), Sampling(max_tokens=max_tokens))
