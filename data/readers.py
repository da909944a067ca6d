"""One file to its records: text, JSON lines or parquet, plain or compressed; a faulty record is told, not raised."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

from sieve.data.paths import Format

MAX_WINDOW = 128 << 20  # bytes; the most that `zstd -d` takes unasked, enough for level 22 and --long=27
_BOM = b"\xef\xbb\xbf"
_DAMAGE = (zstandard.ZstdError, EOFError, gzip.BadGzipFile, zlib.error, pyarrow.ArrowInvalid)


@dataclass(frozen=True)
class Record:
    """Either a text or the fault that kept it from being one. where: the place in its file, in words."""

    where: str
    text: str | None
    fault: str = ""


class WrongField(ValueError):
    """The text field is not among those of a file's first record."""


def records(raw: BinaryIO, path: Path, kind: Format, field: str) -> Iterator[Record]:
    """The records of an open file, in order. field: of the text in JSON lines and parquet.

    Raises WrongField if the first readable record lacks `field`; ValueError if the file itself is damaged, cut short
    or not of its format.
    """
    try:
        if kind == "parquet":
            yield from _parquet(raw, path, field)
        elif kind == "jsonl":
            yield from _lines(_decompressed(raw, path), path, field)
        else:
            yield _decoded("whole file", _decompressed(raw, path).read())
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read to its end, it is damaged or cut short: {error}") from error


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(raw), 1 << 20)
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


class _Zstd(io.RawIOBase):
    """Decompresses frame after frame. zstandard's own stream reader takes a file cut short for its end."""

    _INPUT = 16 << 10

    def __init__(self, raw: BinaryIO):
        self._raw, self._frame = raw, None
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._ready = memoryview(b"")
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._raw.read(self._INPUT)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decoded(where: str, data: bytes) -> Record:
    try:
        return Record(where, data.removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        return Record(where, None, f"not UTF-8 at byte {error.start}")


def _lines(stream: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    first = True
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
        if not line:
            continue
        if number == 1 and line.startswith(b"["):
            raise ValueError(f"{path} is one JSON array, not JSON lines; `jq -c '.[]' {path.name}` makes them")
        record = _parsed(f"line {number}", line, path, field, first)
        first = first and record.text is None
        yield record


def _parsed(where: str, line: bytes, path: Path, field: str, first: bool) -> Record:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Record(where, None, f"not UTF-8 at byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Record(where, None, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Record(where, None, f"a JSON {type(value).__name__} instead of an object")
    if field not in value and first:
        raise WrongField(_wrong_field(path, field, {k: type(v).__name__ for k, v in value.items()}))
    text = value.get(field)
    if not isinstance(text, str):
        return Record(where, None, f"{field} is {type(text).__name__ if field in value else 'absent'}, not a string")
    return Record(where, text)


def _parquet(raw: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    file = pyarrow.parquet.ParquetFile(raw)
    types = {column.name: column.type for column in file.schema_arrow}
    kind = types.get(field)
    if kind is not None and pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise WrongField(_wrong_field(path, field, {name: str(kind) for name, kind in types.items()}))
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=[field]):
        for value in batch.column(0):
            where, row = f"row {row}", row + 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield Record(where, None, f"not UTF-8 at byte {error.start}")
                continue
            yield Record(where, text, "" if text is not None else f"{field} is null, not a string")


def _wrong_field(path: Path, field: str, kinds: dict[str, str]) -> str:
    found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"
    strings = [name for name, kind in kinds.items() if kind in ("str", "string", "large_string")]
    fix = f"set data.text_field={strings[-1] if len(strings) == 1 else '<name>'}" if strings else "none is a string"
    return f"data.text_field={field!r} is not a text in {path}; its records have {found}; {fix}"
