"""Documents from files of any supported kind: one class, so that all formats share their order and their errors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sieve.data.config import DataConfig
from sieve.data.document import Document, Source, size_of
from sieve.data.paths import expand
from sieve.data.python_corpus import PythonSource
from sieve.data.readers import Record, records

logger = logging.getLogger(__name__)

CHECKED_FILES = 64  # whose first record is looked at before any work
HASHED_WHOLE = 64 << 20  # bytes; of larger files, samples, the size and the time of change
SAMPLE_FLOOR = 64 << 10  # bytes of text from a file, where there are many files


def source_of(config: DataConfig, key: str = "data.paths") -> Source:
    """The source that `config` names; key: data.paths or data.validation_paths. ValueError if it is not there."""
    if config.type == "python":
        return PythonSource(min_bytes=config.min_bytes, max_bytes=config.max_bytes)
    validation = key == "data.validation_paths"
    return FileSource(
        config.validation_paths if validation else config.paths, key=key, format=config.format,
        text_field=config.text_field, min_bytes=config.min_bytes,
        max_bytes=None if validation else config.max_bytes, max_broken=config.max_broken,
    )


class FileSource:
    """Documents of files, folders and globs: files in the order of `expand`, documents in the order of their file.

    A text file is one document, a JSON line or a parquet row another. Faulty ones are logged with their place, counted
    and skipped, up to `max_broken`; documents under `min_bytes` are left out; after `max_bytes` of text it ends.
    """

    def __init__(
        self, paths: Sequence[str], *, key: str, format: str, text_field: str, min_bytes: int, max_bytes: int | None,
        max_broken: int,
    ):
        """Arguments as in DataConfig. Raises ValueError if files are missing, of unknown format, or lack text_field."""
        self.files = expand(paths, None if format == "auto" else format, key)
        self._key, self._field, self._min_bytes = key, text_field, min_bytes
        self._max_bytes, self._max_broken = max_bytes, max_broken
        self._sizes = [path.stat().st_size for path, _ in self.files]
        self._before = list(accumulate(self._sizes, initial=0))
        self.done, self._broken, self._short = 0.0, 0, 0
        self._told: set[str] = set()  # a source is read more than once; each fault is logged once
        self.description: dict[str, Any] = {
            "type": "files", "paths": list(paths), "files": len(self.files), "bytes": self._before[-1],
            "text_field": text_field, "min_bytes": min_bytes, "max_bytes": max_bytes,
        }
        self._check()

    def __iter__(self) -> Iterator[Document]:
        self._broken = self._short = taken = 0
        for ordinal in range(len(self.files)):
            for document, size in self._documents(ordinal):
                yield document
                taken += size
                if self._max_bytes is not None and taken >= self._max_bytes:
                    return

    def sample(self, max_bytes: int) -> Iterator[Document]:
        """As in Source: the beginnings of files taken in a pseudo-random order, alike much of each; where max_bytes
        cuts the source itself, the source's beginning."""
        self._broken = self._short = 0
        if self._max_bytes is not None:
            yield from _until(iter(self), max_bytes)
            return
        order = sorted(range(len(self.files)), key=lambda i: hashlib.blake2b(str(i).encode()).digest())
        for place, ordinal in enumerate(order):
            share = min(max_bytes, max(SAMPLE_FLOOR, max_bytes // (len(order) - place)))
            for document in _until((d for d, _ in self._documents(ordinal)), share):
                max_bytes -= size_of(document.text)
                yield document
            if max_bytes <= 0:
                return

    def fingerprint(self) -> str:
        """As in Source: of names' suffixes, sizes and contents in order, so that a moved folder is still the same."""
        digest = hashlib.blake2b(repr((self._field, self._min_bytes, self._max_bytes)).encode(), digest_size=16)
        for (path, kind), size in zip(self.files, self._sizes):
            digest.update(f"{kind}{path.suffix}{size}".encode() + _content(path, size))
        return digest.hexdigest()

    def skipped(self) -> str:
        """As in Source."""
        return f"{self._broken} broken and {self._short} under {self._min_bytes} bytes"

    def _documents(self, ordinal: int) -> Iterator[tuple[Document, int]]:
        """Documents of one file with their sizes in bytes. A document's index counts files and, in a file, documents,
        so that each k-th is a fair choice of both many small files and one large."""
        path, kind = self.files[ordinal]
        total, count = self._before[-1], 0
        with path.open("rb") as raw:
            for record in records(raw, path, kind, self._field):
                self.done = (self._before[ordinal] + raw.tell()) / total
                text, size, fault = _sized(record)
                if text is None:
                    self._skip(f"{path}, {record.where}", fault)
                elif size < self._min_bytes:
                    self._short += 1
                else:
                    yield Document(f"{path.name}#{record.where}", text, ordinal + count), size
                    count += 1
        self.done = self._before[ordinal + 1] / total

    def _skip(self, where: str, fault: str) -> None:
        self._broken += 1
        if self._broken > self._max_broken:
            raise ValueError(
                f"{where}: {fault}; that is broken document {self._broken} and data.max_broken={self._max_broken}; "
                "repair the files, or raise data.max_broken to skip more"
            )
        if where not in self._told:
            self._told.add(where)
            logger.warning("%s: %s; skipped, %d of at most %d", where, fault, self._broken, self._max_broken)

    def _check(self) -> None:
        """Raises ValueError unless the first records of (a spread of) the files can be read and have the text field."""
        if not any(self._sizes):
            raise ValueError(f"{self._key}: all {len(self.files)} files are empty, as {self.files[0][0]}")
        for i in range(0, len(self.files), -(-len(self.files) // CHECKED_FILES)):
            path, kind = self.files[i]
            if kind == "text":
                continue
            with path.open("rb") as raw:
                faults = []
                for record in records(raw, path, kind, self._field):
                    if record.text is not None or len(faults) > self._max_broken:
                        break
                    faults.append(f"{record.where}: {record.fault}")
            if len(faults) > self._max_broken:
                raise ValueError(f"{path}: no record can be read; {faults[0]}; is it {kind} (data.format)?")


def _sized(record: Record) -> tuple[str | None, int, str]:
    if record.text is None:
        return None, 0, record.fault
    try:
        return record.text, size_of(record.text), ""
    except UnicodeEncodeError as error:
        return None, 0, f"a lone surrogate at character {error.start}, which UTF-8 cannot hold"


def _until(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """Documents up to `max_bytes`, the last shortened."""
    for document in documents:
        size = size_of(document.text)
        if size > max_bytes:
            text = document.text.encode()[:max_bytes].decode(errors="ignore")
            if text:
                yield Document(document.id, text, document.index)
            return
        yield document
        max_bytes -= size


def _content(path: Path, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(file, lambda: digest).digest()
        digest.update(str(path.stat().st_mtime_ns).encode())
        for i in range(16):
            file.seek((size - (1 << 20)) * i // 15)
            digest.update(file.read(1 << 20))
    return digest.digest()
