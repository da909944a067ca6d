"""The synthetic tasks: a planted perfect model scores 100 %, a random one what chance gives."""

import pytest
import torch

from sieve.eval.config import NeedleConfig, RecallConfig
from sieve.eval.examples import Example, forward_of, predictor, score
from sieve.eval.needle import haystack, needle
from sieve.eval.recall import GENERATORS, chance

VOCAB = 256
BOS = [1]


def encode(text):
    return list(text.encode())


def recalls(texts, places):
    """Perfect recall: what followed the longest earlier occurrence of the last tokens. It looks at nothing later."""
    found = []
    for text, own in zip(texts, places):
        logits = torch.zeros(len(own), VOCAB)
        for row, place in enumerate(own):
            past, best, guess = text[: place + 1], 0, 0
            for end in range(len(past) - 1):
                size = 0
                while size <= end and past[end - size] == past[-1 - size]:
                    size += 1
                if size > best:
                    best, guess = size, past[end + 1]
            logits[row, guess] = 10.0
        found.append(logits)
    return found


def forgets(texts, places):
    """A fixed answer that has nothing to do with the text."""
    return [torch.eye(VOCAB)[7].repeat(len(own), 1) for own in places]


NEEDLE = NeedleConfig(lengths=(160, 300), depths=(0.0, 0.4, 1.0), samples=2, digits=4, keys=3)
RECALL = RecallConfig(pairs=(4, 12), lengths=(16, 40), samples=4)


@pytest.mark.parametrize("kind", ["needle", "multikey", "passkey"])
def test_needle(kind):
    config = NEEDLE if kind != "multikey" else NEEDLE.model_copy(update={"lengths": (260, 300)})
    examples = list(needle(config, encode, BOS, 0, kind=kind))
    for example in examples:
        assert len(example.tokens) == example.condition["length"]
        ((start, end),) = example.answers
        text = bytes(example.tokens[1:]).decode()
        number = bytes(example.tokens[start:end]).decode()
        assert len(number) == 5 and text.endswith(f" is{number}") and text.count(f" is{number}.") == 1
        if kind != "multikey":
            room = text.index("The pass key" if kind == "passkey" else "The magic") / text.rindex("The ")
            assert abs(room - example.condition["depth"]) < 0.3
    rows = score(recalls, examples, 1000)
    assert [(r["length"], r["depth"]) for r in rows] == [(n, d) for n in config.lengths for d in config.depths]
    assert all(r["accuracy"] == 1 and r["answers"] == 2 for r in rows)
    assert all(r["accuracy"] == 0 for r in score(forgets, examples, 1000))
    assert examples == list(needle(config, encode, BOS, 0, kind=kind))
    assert examples != list(needle(config, encode, BOS, 1, kind=kind))


@pytest.mark.parametrize("task", list(GENERATORS))
def test_recall(task):
    examples = list(GENERATORS[task](RECALL, range(10, 100), BOS, 0))
    rows = score(recalls, examples, 500)
    assert len(rows) == 2 and all(r["accuracy"] == 1 for r in rows)
    assert all(r["accuracy"] == 0 for r in score(forgets, examples, 500))


@pytest.mark.parametrize("task", list(GENERATORS))
def test_a_random_decoder_scores_chance(tiny, task):
    """With 20 tokens to choose from, chance is to be seen: within four standard deviations, of many answers."""
    alphabet = range(20)
    decoder = tiny(vocab=20)
    config = RecallConfig(pairs=(8,), lengths=(12,), samples=100)
    rows = score(predictor(forward_of(decoder), torch.device("cpu")), GENERATORS[task](config, alphabet, [], 0), 4000)
    expected = 1 / 20
    spread = (expected * (1 - expected) / rows[0]["answers"]) ** 0.5
    assert abs(rows[0]["accuracy"] - expected) < 4 * spread + 0.03
    assert rows[0]["loss"] > 2
    assert expected <= chance(task, alphabet) <= 0.1


def test_a_planted_decoder_is_scored_by_its_own_logits(tiny):
    """The whole way through packing and places: the answers are what the decoder itself would say."""
    decoder = tiny(vocab=61)
    predict = predictor(forward_of(decoder), torch.device("cpu"))
    rng, examples = torch.Generator().manual_seed(0), []
    for n in (30, 9, 55, 41):
        tokens = torch.randint(0, 61, (n,), generator=rng).tolist()
        for at in (n // 2, n - 1):  # put the likeliest token there
            tokens[at] = int(predict([tokens[:at]], [[at - 1]])[0].argmax())
        examples.append(Example(tokens, ((n // 2, n // 2 + 1), (n - 1, n)), {"n": n}))
    rows = score(predict, examples, 90)
    assert [r["accuracy"] for r in rows] == [1.0] * 4 and [r["n"] for r in rows] == [30, 9, 55, 41]
    wrong = [Example([*e.tokens[:-1], (e.tokens[-1] + 1) % 61], e.answers, e.condition) for e in examples]
    assert [r["accuracy"] for r in score(predict, wrong, 90)] == [0.5] * 4


def test_haystack_of_real_text():
    fill = haystack(encode, tokens=[5, 6, 7])
    assert fill(1, 5) == [6, 7, 5, 6, 7] and fill(3, 2) == [5, 6]


def test_users_mistakes():
    with pytest.raises(ValueError, match="needle.lengths=20 is too short; needle needs at least"):
        list(needle(NeedleConfig(lengths=(20,)), encode, BOS, 0))
    with pytest.raises(ValueError, match="recall.pairs=16 is more than the 10 tokens"):
        list(GENERATORS["mqar"](RecallConfig(), range(20), BOS, 0))
    with pytest.raises(ValueError, match="shares between 0"):
        NeedleConfig(depths=(1.5,))
