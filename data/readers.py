"""One file to its records: text, JSON lines or parquet, plain or compressed; a faulty record is told, not raised."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

from sieve.data.files import File

MAX_WINDOW = 128 << 20  # bytes; the most that `zstd -d` takes unasked, enough for level 22 and --long=27
JSON_OVERHEAD = 8  # a line may be so many times its text: escapes take up to 6 bytes for one, other fields the rest
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


def records(raw: BinaryIO, file: File, field: str, *, max_bytes: int, skip: int = 0) -> Iterator[Record]:
    """The records of an open file, in order, without its first `skip`. field: of the text in JSON lines and parquet.

    max_bytes: what needs more memory than such a document may is not read but a fault. Raises WrongField if the first
    readable record lacks `field`; ValueError if the file itself is damaged, cut short or not of its format.
    """
    try:
        if file.kind == "parquet":
            yield from _parquet(raw, file, field, skip)
        elif file.kind == "jsonl":
            yield from _lines(_decompressed(raw, file), file, field, max_bytes, skip)
        elif not skip:
            yield _whole(_decompressed(raw, file), max_bytes)
    except _DAMAGE as error:
        raise ValueError(f"{file.location} cannot be read to its end, it is damaged or cut short: {error}") from error


def _decompressed(raw: BinaryIO, file: File) -> BinaryIO:
    if file.name.endswith(".zst"):
        return io.BufferedReader(_Zstd(raw), 1 << 20)
    return gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw


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


def _whole(stream: BinaryIO, max_bytes: int) -> Record:
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        return Record("whole file", None, too_large(f"more than {max_bytes}", max_bytes))
    try:
        return Record("whole file", data.removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        return Record("whole file", None, f"not UTF-8 at byte {error.start}")


def too_large(size: int | str, max_bytes: int) -> str:
    """The fault of a document of `size` bytes."""
    return f"{size} bytes, and data.max_document_bytes={max_bytes}"


def _lines(stream: BinaryIO, file: File, field: str, max_bytes: int, skip: int) -> Iterator[Record]:
    first, number, longest = True, 0, JSON_OVERHEAD * max_bytes
    while line := stream.readline(longest):
        number += 1
        where, cut = f"line {number}", len(line) == longest and not line.endswith(b"\n")
        while cut and (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        line = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
        if not line:
            continue
        if number == 1 and line.startswith(b"["):
            raise ValueError(
                f"{file.location} is one JSON array, not JSON lines; `jq -c '.[]' {file.name}` makes them"
            )
        if skip:
            skip, first = skip - 1, False
        elif cut:
            yield Record(where, None, too_large(f"a line of more than {longest}", max_bytes))
        else:
            record = _parsed(where, line, file, field, first)
            first = first and record.text is None
            yield record


def _parsed(where: str, line: bytes, file: File, field: str, first: bool) -> Record:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Record(where, None, f"not UTF-8 at byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Record(where, None, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Record(where, None, f"a JSON {type(value).__name__} instead of an object")
    if field not in value and first:
        raise WrongField(_wrong_field(file, field, {k: type(v).__name__ for k, v in value.items()}))
    text = value.get(field)
    if not isinstance(text, str):
        return Record(where, None, f"{field} is {type(text).__name__ if field in value else 'absent'}, not a string")
    return Record(where, text)


def _parquet(raw: BinaryIO, file: File, field: str, skip: int) -> Iterator[Record]:
    table = pyarrow.parquet.ParquetFile(raw)
    types = {column.name: column.type for column in table.schema_arrow}
    kind = types.get(field)
    if kind is not None and pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise WrongField(_wrong_field(file, field, {name: str(kind) for name, kind in types.items()}))
    row = group = 0
    while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= skip:
        row, group = row + table.metadata.row_group(group).num_rows, group + 1
    for batch in table.iter_batches(batch_size=64, row_groups=range(group, table.num_row_groups), columns=[field]):
        for value in batch.column(0):
            where, row = f"row {row}", row + 1
            if row <= skip:
                continue
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield Record(where, None, f"not UTF-8 at byte {error.start}")
                continue
            yield Record(where, text, "" if text is not None else f"{field} is null, not a string")


def _wrong_field(file: File, field: str, kinds: dict[str, str]) -> str:
    found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"
    strings = [name for name, kind in kinds.items() if kind in ("str", "string", "large_string")]
    fix = f"set data.text_field={strings[-1] if len(strings) == 1 else '<name>'}" if strings else "none is a string"
    return f"data.text_field={field!r} is not a text in {file.location}; its records have {found}; {fix}"
