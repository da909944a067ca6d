"""Text that teaches recall: documents with facts told among other text and asked for again, as JSON lines.

The facts read as those of `sieve eval suite=needle`; names, numbers and hay are other ones. Mixed into a corpus, it gives
small models something that only attention far back can predict:

  python -m sieve.scripts.recall_text recall.jsonl --documents 2000 --chars 2000-30000 --hay books/*.txt
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sieve.data.config import DataConfig
from sieve.data.sources import source_of
from sieve.eval.needle import CITIES, FILLER, lead

ROOM = 50  # characters of a document for each time that a fact stands in it, so that some of it is left to be hay
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"
_QUOTE = 40  # characters of the shortest passage that is said again
_WORD = re.compile(r"\b[A-Za-z]{3,12}\b")


def names(rng: np.random.Generator, count: int, words: Sequence[str]) -> list[str]:
    """`count` different names, none of them one of evaluation's: about half of them of `words`, the others invented, so
    that what is learnt is to compare names and not a list of them."""
    found: dict[str, None] = {}
    while len(found) < count:
        if len(words) and rng.random() < 0.5:
            name = str(words[int(rng.integers(len(words)))]).capitalize()
        else:
            name = "".join(
                _CONSONANTS[int(rng.integers(len(_CONSONANTS)))] + _VOWELS[int(rng.integers(len(_VOWELS)))]
                for _ in range(int(rng.integers(2, 4)))
            ).capitalize()
        if name not in CITIES:
            found[name] = None
    return list(found)


def document(
    rng: np.random.Generator, hay: str, chars: int, facts: int, digits: int, *, asked: int = 1, passkey: float = 0.25,
    quoted: float = 0.0, words: Sequence[str] = (),
) -> str:
    """About `chars` characters: a random piece of hay in which each of `facts` facts is told at a random place, asked and
    answered `asked` - 1 times at random places behind that, and once at the end, in another order.

    A question with its answer reads as the fact itself does. passkey: how likely one of the facts is a passkey. quoted:
    how much of the hay are passages that stood in it before, of 40 characters on: the plainest recall, learnt first.
    words: see `names`.
    """
    told = [lead("needle", name) for name in names(rng, facts, words)]
    if rng.random() < passkey:
        told[0] = lead("passkey", "")
    told = [f"{words} {rng.integers(10 ** (digits - 1), 10**digits)}" for words in told]
    room = max(0, chars - (asked + 1) * sum(len(fact) + 2 for fact in told))
    start = int(rng.integers(0, len(hay)))
    text = hay[start : start + room]
    text += (hay * ((room - len(text)) // len(hay) + 1))[: room - len(text)]
    if quoted:
        text = _quoting(rng, text, quoted)
    places = []
    for fact in told:
        first = int(rng.integers(0, room + 1))
        places += [(first, 0, fact), *((int(place), 1, fact) for place in rng.integers(first, room + 1, asked - 1))]
    parts, used = [], 0
    for place, _, fact in sorted(places):
        parts += [text[used:place], fact, ".\n"]
        used = place
    parts.append(text[used:])
    return "".join(parts) + "".join(f"{told[i]}.\n" for i in rng.permutation(len(told)))


def _quoting(rng: np.random.Generator, text: str, share: float) -> str:
    """`text` with passages of it said again further on until they are `share` of it, and cut to its length."""
    new, left = round(len(text) * (1 - share)), round(len(text) * share)
    places = []
    while left > 0 and new >= _QUOTE:
        size = int(rng.integers(_QUOTE, min(new, 6 * _QUOTE) + 1))
        place = int(rng.integers(size, new + 1))
        start = int(rng.integers(0, place - size + 1))
        places.append((place, text[start : start + size]))
        left -= size
    parts, used = [], 0
    for place, passage in sorted(places):
        parts += [text[used:place], passage]
        used = place
    return "".join([*parts, text[used:new]])[: len(text)]


def _text_of(paths: Sequence[str]) -> str:
    """All documents of files, one after the other. ValueError when there are none."""
    try:
        return "\n".join(document.text for document in source_of(DataConfig(type="files", paths=tuple(paths))))
    except ValueError as error:
        raise ValueError(f"--hay: {str(error).removeprefix('data.paths: ')}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after a message for a user's mistake."""
    parser = argparse.ArgumentParser(prog="recall_text", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("out", type=Path, help="the file to write, one {\"text\": ...} a line")
    add("--documents", type=int, default=1000, help="(default %(default)s)")
    add("--chars", default="1000-20000", help="least and most of a document; short ones are more frequent, but for "
                                              "less of the text (default %(default)s)")
    add("--facts", type=int, default=4, help="most facts in a document; fewer in short ones (default %(default)s)")
    add("--asked", type=int, default=1, help="most times that each is asked for, last at the end (default %(default)s)")
    add("--quoted", type=float, default=0.0, help="share of the hay that was in it before (default %(default)s)")
    add("--digits", type=int, default=5, help="of a fact's number (default %(default)s)")
    add("--hay", nargs="*", default=[], help="files to hide the facts in: text, JSON lines or parquet, plain or compressed; "
                                             "none: a few plain sentences")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        least, most = (int(part) for part in options.chars.split("-"))
        counts = (options.documents, options.facts, options.asked, options.digits)
        if not (0 < least <= most and 0 <= options.quoted < 1) or min(counts) < 1:
            raise ValueError
    except ValueError:
        print(
            f"recall_text: --chars={options.chars} --documents={options.documents} --facts={options.facts} "
            f"--asked={options.asked} --digits={options.digits} --quoted={options.quoted}: give LEAST-MOST characters, a share "
            "below 1 that is quoted, and at least one of each of the others",
            file=sys.stderr,
        )
        return 2
    try:
        hay = _text_of(options.hay) if options.hay else FILLER
        words = sorted(set(_WORD.findall(hay)))
        partial = options.out.with_name(f".{options.out.name}.tmp")  # so that what has the name is whole
        with partial.open("w", encoding="utf-8") as file:
            for number in range(options.documents):
                rng = np.random.default_rng((options.seed, 99, number))
                chars = round(rng.uniform(most**-0.5, least**-0.5) ** -2)
                asked = int(rng.integers(1, options.asked + 1))
                limit = max(1, min(options.facts, chars // (ROOM * (asked + 1))))
                facts = int(math.exp(rng.uniform(0, math.log(limit + 1))))
                text = document(
                    rng, hay, chars, facts, options.digits, asked=asked, quoted=options.quoted, words=words
                )
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        partial.replace(options.out)
    except (OSError, ValueError) as error:
        print(f"recall_text: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
