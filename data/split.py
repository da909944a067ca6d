"""Which documents train and which validate: decided document by document, so that one pass over a source does both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from sieve.data.document import Document, Source, in_words


@dataclass(frozen=True)
class Split:
    """Every `every`-th document validates, beginning with the first; None: all are for `part`, as when validation has a
    source of its own. A source of one document (`single`) is cut, its last 1 / every for validation."""

    every: int | None
    part: str = "train"
    single: bool = False

    @classmethod
    def of(cls, source: Source, fraction: float) -> Split:
        """The split of `source` that gives about `fraction` to validation. Raises ValueError if it has no document."""
        found = len(list(islice(source, 2)))
        if not found:
            raise ValueError(f"there is no document in {in_words(source)}: {source.skipped()} were left out")
        return cls(max(2, round(1 / fraction)), single=found == 1)

    def parts(self, document: Document) -> Iterator[tuple[str, str]]:
        """(part, text) of a document: one, or two where the only document is cut, after a newline if there is one."""
        if self.every is None:
            yield self.part, document.text
        elif self.single:
            limit = len(document.text) - len(document.text) // self.every
            end = document.text.rfind("\n", 0, limit) + 1 or limit
            yield "train", document.text[:end]
            if end < len(document.text):
                yield "validation", document.text[end:]
        else:
            yield ("validation" if document.index % self.every == 0 else "train"), document.text

    def nothing_for(self, part: str, source: Source, skipped: str) -> ValueError:
        """The error where `source` leaves `part` no document; skipped: what was left out, in words."""
        other = "data.validation_paths (data.validation_split on the Hub)"
        if self.every is None:
            why = "it is the only text of that part; name other files, or repair these"
        elif self.single:
            why = (
                f"its one document is too short to be cut for validation; give more text or {other}, or raise "
                "data.validation_fraction"
            )
        elif part == "validation":
            why = (
                f"one of {self.every} documents validates, the first of each {self.every}, and none of these is left; raise "
                f"data.validation_fraction (about {1 / self.every:.2g} now), or give {other} or more documents"
            )
        else:
            why = (
                f"one of {self.every} documents validates, which are all that are left; lower data.validation_fraction (about "
                f"{1 / self.every:.2g} now), or give {other} or more documents"
            )
        return ValueError(f"there is no {part} document in {in_words(source)} ({skipped} left out): {why}")
