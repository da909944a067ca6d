"""What every source of text yields, and what a source is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Document:
    """A text and where it comes from. index: its place in the source, by which training and validation are parted."""

    id: str
    text: str
    index: int


class Source(Protocol):
    """Documents in an order that depends on nothing but the source's settings and contents; may be iterated again.

    done: the share of the current iteration that is over, 0 to 1. description: JSON-able, for a manifest. cursor:
    JSON-able, where the iteration goes on behind the document that it gave last.
    """

    done: float
    description: dict[str, Any]
    cursor: dict[str, int]

    def __iter__(self) -> Iterator[Document]: ...

    def after(self, cursor: dict[str, int]) -> Iterator[Document]:
        """The documents behind `cursor`, as they and their counts would have come without the stop; {}: all."""

    def sample(self, max_bytes: int) -> Iterator[Document]:
        """About `max_bytes` of text that stand for the whole; long documents may be shortened to their beginning."""

    def fingerprint(self) -> str:
        """Hex; changes when the documents may have changed."""

    def skipped(self) -> str:
        """What the last iteration left out and why, in words."""


def size_of(text: str) -> int:
    """Bytes of `text` in UTF-8. Raises UnicodeEncodeError for lone surrogates, which UTF-8 cannot hold."""
    return len(text) if text.isascii() else len(text.encode())


def in_words(source: Source) -> str:
    """What `source` reads, for messages."""
    about = source.description
    if "first" not in about:
        return f"the {about.get('type', 'given')} source"
    return about["first"] if about["files"] == 1 else f"{about['files']} files, the first {about['first']}"
