"""A file of text, here or behind a URL: what readers and sources need to know of it, and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, Protocol

Format = Literal["text", "jsonl", "parquet"]

COMPRESSION = (".zst", ".gz")
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "text": (
        ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".log",
        ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs",
        ".rb", ".sh", ".sql", ".css", ".toml", ".yaml", ".yml", ".ini", ".cfg",
    ),
}
SAMPLES, SAMPLE = 16, 64 << 10  # of a file that is not hashed whole: how many, and bytes of each


class File(Protocol):
    """location: path or URL, for messages. name: its last part. kind: how it is read. size: bytes as stored, None if a
    server does not tell. key: equal for two files that are one."""

    @property
    def location(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Format: ...
    @property
    def size(self) -> int | None: ...
    @property
    def key(self) -> str: ...

    def open(self) -> BinaryIO: ...

    def digest(self, whole: int) -> bytes:
        """Changes when the content may have changed; of up to `whole` bytes, when it has."""


@dataclass(frozen=True)
class LocalFile:
    """A File on a mounted disk."""

    path: Path
    kind: Format

    @property
    def location(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def key(self) -> str:
        return str(self.path.resolve())

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def digest(self, whole: int) -> bytes:
        """Of the content; of a file above `whole` bytes, of samples of it, its size and its time of change."""
        status = self.path.stat()
        digest = hashlib.blake2b(digest_size=16)
        with self.path.open("rb") as file:
            if status.st_size <= whole:
                return hashlib.file_digest(file, lambda: digest).digest()
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            for i in range(SAMPLES):
                file.seek(max(status.st_size - SAMPLE, 0) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
        return digest.digest()


def format_of(path: PurePath) -> Format | None:
    """The format that a file's name tells, or None."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix.lower()
    for kind, suffixes in SUFFIXES.items():
        if suffix in suffixes and not (kind == "parquet" and path.suffix in COMPRESSION):
            return kind
    return None


def unknown_format(location: str, key: str) -> str:
    """What to say of a file whose name tells no format. key: the setting that names it; only beside data's own is there a
    data.format."""
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    return (
        f"{key}: {location} is of no known format; known are {known}, text and JSON lines also with "
        f"{' or '.join(COMPRESSION)} behind"
        + ("; data.format=text reads any file as text" if key.startswith("data.") else "")
    )
