"""Documents from files of any supported kind: one class, so that all formats share their order and their errors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, BinaryIO

from sieve.data.config import DataConfig
from sieve.data.document import Document, Source, size_of
from sieve.data.files import File
from sieve.data.hub import hub_files
from sieve.data.paths import expand
from sieve.data.python_corpus import PythonSource
from sieve.data.readers import Record, records, too_large
from sieve.data.remote import Remote, RemoteFile

logger = logging.getLogger(__name__)

CHECKED_FILES, CHECKED_REMOTE = 64, 4  # files whose first record is looked at before any work
HASHED_WHOLE, HASHED_TOTAL = 64 << 20, 4 << 30  # bytes of a file, and of all files, that a start may read to know them
SAMPLE_FLOOR = 64 << 10  # bytes of text from a file, where there are many files


def source_of(config: DataConfig, *, validation: bool = False, named: str | None = None) -> Source:
    """The source that `config` names for training, or the one of its own that it names for validation.

    named: the setting that gave `config` its files, for messages, where it is not one of data's.
    ValueError if it is not there, if the type holds no text, or if `config` is a mixture.
    """
    if config.sources:
        raise ValueError(
            f"data.sources={{{','.join(config.sources)}}} is a mixture, which training alone reads; prepare each source on its "
            "own (data=files data.paths=..., as it stands in data.sources.NAME), all with one tokenizer.path that was trained "
            "on one of them, and mix the shards: data.sources.NAME={type:shards,paths:FOLDER}"
        )
    if config.type == "python":
        return PythonSource(min_bytes=config.min_bytes, max_bytes=config.max_bytes)
    remote = Remote(config.storage_options, config.retries, config.timeout)
    forced = None if config.format == "auto" else config.format
    if config.type == "hub":
        key = "data.validation_split" if validation else "data.split"
        files = hub_files(config, config.validation_split if validation else config.split, forced, key, remote)
    elif config.type == "files":
        key = named or ("data.validation_paths" if validation else "data.paths")
        files = expand(config.validation_paths if validation else config.paths, forced, key, remote)
    else:
        raise ValueError(f"data.type={config.type} holds tokens, not text; choose the source that they were made from")
    return FileSource(
        files, key=key, text_field=config.text_field, min_bytes=config.min_bytes,
        max_bytes=None if validation else config.max_bytes, max_broken=config.max_broken,
        max_document_bytes=config.max_document_bytes,
    )


@dataclass(frozen=True)
class Cursor:
    """Where a FileSource is: `record` records into `file`, of which `documents` were good; what was taken and left out
    before it, over all files."""

    file: int = 0
    record: int = 0
    documents: int = 0
    taken: int = 0
    broken: int = 0
    short: int = 0


class FileSource:
    """Documents of files: files in the order given, documents in the order of their file.

    A text file is one document, a JSON line or a parquet row another. Faulty ones are logged with their place, counted
    and skipped, up to `max_broken`; documents under `min_bytes` are left out; after `max_bytes` of text it ends.
    """

    def __init__(
        self, files: Sequence[File], *, key: str, text_field: str, min_bytes: int, max_bytes: int | None,
        max_broken: int, max_document_bytes: int,
    ):
        """key: the setting that names the files; the rest as in DataConfig. Raises ValueError if the files are empty,
        lack text_field or are not what their format says."""
        self.files = list(files)
        self.key, self._field, self._min_bytes = key, text_field, min_bytes
        self._max_bytes, self._max_broken, self._largest = max_bytes, max_broken, max_document_bytes
        self._sizes = [file.size or 0 for file in self.files]
        self._before = list(accumulate(self._sizes, initial=0))
        self.done, self._at = 0.0, Cursor()
        self._told: set[str] = set()  # a source is read more than once; each fault is logged once
        self.description: dict[str, Any] = {
            "type": "files", "first": self.files[0].location, "files": len(self.files), "bytes": self._before[-1],
            "text_field": text_field, "min_bytes": min_bytes, "max_bytes": max_bytes,
            "max_document_bytes": max_document_bytes,
        }
        self._check()

    @property
    def cursor(self) -> dict[str, int]:
        """As in Source."""
        return asdict(self._at)

    def __iter__(self) -> Iterator[Document]:
        return self.after({})

    def after(self, cursor: dict[str, int]) -> Iterator[Document]:
        """As in Source: files before the cursor are not opened, records before it in its file not parsed."""
        self._at = Cursor(**cursor)
        for ordinal in range(self._at.file, len(self.files)):
            if self._full():
                return
            if ordinal > self._at.file:
                self._at = replace(self._at, file=ordinal, record=0, documents=0)
            for document in self._documents():
                yield document
                if self._full():
                    return

    def _full(self) -> bool:
        """Whether max_bytes are taken."""
        if self._max_bytes is None or self._at.taken < self._max_bytes:
            return False
        self.done = 1.0
        return True

    def sample(self, max_bytes: int) -> Iterator[Document]:
        """As in Source: the beginnings of files taken in a pseudo-random order, alike much of each; where max_bytes
        cuts the source itself, the source's beginning."""
        self._at = Cursor()
        if self._max_bytes is not None:
            yield from _until(iter(self), max_bytes)
            return
        order = sorted(range(len(self.files)), key=lambda i: hashlib.blake2b(str(i).encode()).digest())
        for place, ordinal in enumerate(order):
            share = min(max_bytes, max(SAMPLE_FLOOR, max_bytes // (len(order) - place)))
            self._at = replace(self._at, file=ordinal, record=0, documents=0)
            for document in _until(self._documents(), share):
                max_bytes -= size_of(document.text)
                yield document
            if max_bytes <= 0:
                return

    def fingerprint(self) -> str:
        """As in Source: of names' suffixes, sizes and contents in order, so that a moved folder is still the same."""
        settings = (self._field, self._min_bytes, self._max_bytes, self._largest)
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        whole = HASHED_WHOLE if self._before[-1] <= HASHED_TOTAL else 0
        for file, size in zip(self.files, self._sizes):
            digest.update(f"{file.kind}{file.name.rpartition('.')[2]}{size}".encode() + file.digest(whole))
        return digest.hexdigest()

    def skipped(self) -> str:
        """As in Source."""
        return f"{self._at.broken} broken and {self._at.short} under {self._min_bytes} bytes"

    def _documents(self) -> Iterator[Document]:
        """The documents of the file at the cursor, which moves with them. A document's index counts files and, in a
        file, documents, so that each k-th is a fair choice of both many small files and one large."""
        ordinal = self._at.file
        file, total = self.files[ordinal], self._before[-1]
        with file.open() as raw:
            for record in self._records(raw, file, self._at.record):
                self._at = replace(self._at, record=self._at.record + 1)
                self.done = min(1.0, (self._before[ordinal] + raw.tell()) / total) if total else 0.0
                text, size, fault = self._sized(record)
                if text is None:
                    self._skip(f"{file.location}, {record.where}", fault)
                elif size < self._min_bytes:
                    self._at = replace(self._at, short=self._at.short + 1)
                else:
                    document = Document(f"{file.name}#{record.where}", text, ordinal + self._at.documents)
                    self._at = replace(self._at, documents=self._at.documents + 1, taken=self._at.taken + size)
                    yield document
        self.done = self._before[ordinal + 1] / total if total else (ordinal + 1) / len(self.files)

    def _records(self, raw: BinaryIO, file: File, skip: int = 0) -> Iterator[Record]:
        return records(raw, file, self._field, max_bytes=self._largest, skip=skip)

    def _sized(self, record: Record) -> tuple[str | None, int, str]:
        """(text, its bytes in UTF-8, "") of a good record; (None, 0, fault) of another."""
        if record.text is None:
            return None, 0, record.fault
        try:
            size = size_of(record.text)
        except UnicodeEncodeError as error:
            return None, 0, f"a lone surrogate at character {error.start}, which UTF-8 cannot hold"
        return (record.text, size, "") if size <= self._largest else (None, 0, too_large(size, self._largest))

    def _skip(self, where: str, fault: str) -> None:
        self._at = replace(self._at, broken=self._at.broken + 1)
        broken = self._at.broken
        if broken > self._max_broken:
            raise ValueError(
                f"{where}: {fault}; that is broken document {broken} and data.max_broken={self._max_broken}; "
                "repair the files, or raise data.max_broken to skip more"
            )
        if where not in self._told:
            self._told.add(where)
            logger.warning("%s: %s; skipped, %d of at most %d", where, fault, broken, self._max_broken)

    def _check(self) -> None:
        """Raises ValueError unless the first records of (a spread of) the files can be read and have the text field."""
        if not any(self._sizes) and None not in (file.size for file in self.files):
            raise ValueError(f"{self.key}: all {len(self.files)} files are empty, as {self.files[0].location}")
        most = CHECKED_REMOTE if isinstance(self.files[0], RemoteFile) else CHECKED_FILES
        for i in range(0, len(self.files), -(-len(self.files) // most)):
            file = self.files[i]
            if file.kind == "text":
                continue
            with file.open() as raw:
                faults = []
                for record in self._records(raw, file):
                    if record.text is not None or len(faults) > self._max_broken:
                        break
                    faults.append(f"{record.where}: {record.fault}")
            if len(faults) > self._max_broken:
                raise ValueError(
                    f"{file.location}: no record can be read; {faults[0]}; is it {file.kind} (data.format)?"
                )


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
