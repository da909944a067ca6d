"""Text that teaches recall: documents with facts scattered in them and asked for at their end, as JSON lines.

The facts read as those of `sieve eval suite=needle`; numbers, places and hay are other ones. Mixed into a corpus, by
data.paths, it gives small models something that only attention far back can predict:

  python -m sieve.scripts.recall_text recall.jsonl --documents 2000 --chars 2000-30000 --hay books/*.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sieve.eval.needle import CITIES, FILLER, lead


def document(rng: np.random.Generator, hay: str, chars: int, facts: int, digits: int, passkey: bool) -> str:
    """About `chars` characters: `facts` facts at random places of a random piece of hay, then each asked and answered, in
    another order."""
    kind = "passkey" if passkey else "needle"
    names = [""] if passkey else list(rng.choice(CITIES, facts, replace=False))
    told = [f"{lead(kind, name)} {rng.integers(10 ** (digits - 1), 10**digits)}" for name in names]
    room = max(0, chars - 2 * sum(map(len, told)))
    start = int(rng.integers(0, len(hay)))
    text = (hay[start:] + hay * (room // len(hay) + 1))[:room]
    parts, used = [], 0
    for place, fact in zip(sorted(rng.integers(0, room + 1, len(told))), told):
        parts += [text[used:place], fact, ".\n"]
        used = place
    parts.append(text[used:])
    return "".join(parts) + "".join(f"{told[i]}." for i in rng.permutation(len(told)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after a message for a user's mistake."""
    parser = argparse.ArgumentParser(prog="recall_text", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("out", type=Path, help="the file to write, one {\"text\": ...} a line")
    add("--documents", type=int, default=1000, help="(default %(default)s)")
    add("--chars", default="1000-20000", help="least and most characters of a document (default %(default)s)")
    add("--facts", type=int, default=4, help="most facts in a document (default %(default)s)")
    add("--digits", type=int, default=5, help="of a fact's number (default %(default)s)")
    add("--hay", type=Path, nargs="*", default=[], help="text files to hide the facts in; none: a few plain sentences")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        least, most = (int(part) for part in options.chars.split("-"))
        if not 0 < least <= most or options.documents < 1 or not 0 < options.facts <= len(CITIES) or options.digits < 1:
            raise ValueError
    except ValueError:
        print(
            f"recall_text: --chars={options.chars} --documents={options.documents} --facts={options.facts} --digits="
            f"{options.digits}: give LEAST-MOST characters, at least one document and digit, 1 to {len(CITIES)} facts",
            file=sys.stderr,
        )
        return 2
    try:
        hay = "\n".join(path.read_text(encoding="utf-8") for path in options.hay) or FILLER
        with options.out.open("w", encoding="utf-8") as file:
            for number in range(options.documents):
                rng = np.random.default_rng((options.seed, 99, number))
                chars, facts = int(rng.integers(least, most + 1)), int(rng.integers(1, options.facts + 1))
                text = document(rng, hay, chars, facts, options.digits, passkey=bool(rng.random() < 0.25))
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    except (OSError, UnicodeDecodeError) as error:
        print(f"recall_text: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
