"""Every fact is told once before it is asked for, and answered with its own number."""

import json
import re

import numpy as np

from sieve.eval.needle import CITIES
from sieve.scripts.recall_text import document, main


def test_facts_are_told_before_they_are_asked(tmp_path, capsys):
    hay = tmp_path / "hay.txt"
    hay.write_text("Call me Ishmael. " * 50)
    out = tmp_path / "out.jsonl"
    assert main([str(out), "--documents", "40", "--chars", "300-900", "--facts", "3", "--hay", str(hay)]) == 0
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 40 and len(set(texts)) == 40
    kinds = set()
    for text in texts:
        told = re.findall(r"\nThe (pass key|magic number of \w+) is (\d{5})\.", text)
        names = [name for name, _ in told]
        assert 2 <= len(told) <= 6 and len(told) % 2 == 0
        assert sorted(told[: len(told) // 2]) == sorted(told[len(told) // 2 :]) and len(set(names)) == len(told) // 2
        assert 250 <= len(text) <= 1000
        kinds |= {name.split()[0] for name in names}
    assert kinds == {"pass", "magic"}
    assert main([str(out), "--chars", "900-300"]) == 2 and "--chars=900-300" in capsys.readouterr().err
    assert main([str(out), "--hay", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "recall_text: --hay: " in said and "none' does not exist" in said


def test_facts_are_asked_several_times_and_always_answered_alike(tmp_path):
    hay, out = tmp_path / "hay.jsonl", tmp_path / "out.jsonl"
    hay.write_text("".join(json.dumps({"text": f"The {word} of Rome sailed on. " * 9}) + "\n" for word in ("ship", "wind")))
    assert main([str(out), "--documents", "60", "--chars", "400-4000", "--facts", "9", "--asked", "3", "--hay", str(hay)]) == 0
    most, names = 0, set()
    for line in out.read_text().splitlines():
        numbers = {}
        told = re.findall(r"\nThe (pass key|magic number of \w+) is (\d{5})\.", json.loads(line)["text"])
        for name, number in told:
            numbers.setdefault(name, []).append(number)
        assert all(len(set(own)) == 1 for own in numbers.values()) and len({len(own) for own in numbers.values()}) == 1
        assert [name for name, _ in told[-len(numbers) :]] != sorted(numbers) or len(numbers) < 4, "asked in another order"
        most = max(most, len(told) // len(numbers))
        names |= {name.split()[-1] for name in numbers}
    assert most == 4 and len(names) > 100 and "Sailed" in names
    assert not names & set(CITIES), "evaluation's names are not to be learnt"


def test_quoted_passages_stood_there_before():
    rng = np.random.default_rng(0)
    hay = "".join(chr(97 + i) for i in rng.integers(0, 26, 5000))
    text, plain = (document(rng, hay, 3000, 1, 5, passkey=0, quoted=quoted) for quoted in (0.5, 0.0))
    assert 2900 < len(text) <= 3000

    def repeated(text):
        return sum(text.find(text[i : i + 12]) < i for i in range(len(text) - 12)) / len(text)

    assert 0.3 < repeated(text) < 0.7 and repeated(plain) < 0.05
