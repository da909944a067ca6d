"""Every fact is told once before it is asked for, and answered with its own number."""

import json
import re

from sieve.scripts.recall_text import main


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
    assert main([str(out), "--hay", str(tmp_path / "none")]) == 2 and "No such file" in capsys.readouterr().err
