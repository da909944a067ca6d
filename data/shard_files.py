"""How tokens lie in a folder of shards: names, the manifest, and the numbers that prove a file.

    FOLDER/manifest.json            written last: without it the folder is not finished
    FOLDER/tokenizer/               the tokenizer, also in the format of transformers
    FOLDER/train/00000.tokens       uint16 or uint32, little-endian, flat: documents end to end, each with bos and eos
    FOLDER/train/00000.offsets      int64 [documents + 1]: where each document of this shard begins, in tokens
    FOLDER/validation/...
    FOLDER/journal.json             while under way: what is written for good, and where the source goes on
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sieve.data.disk import writing

FORMAT = 1  # raise it when the files, or the ids of the same text and tokenizer, change
MANIFEST, JOURNAL, TOKENIZER = "manifest.json", "journal.json", "tokenizer"
OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest lists it; sha256 in hex of each file."""

    name: str
    documents: int
    tokens: int
    tokens_sha256: str
    offsets_sha256: str

    def files(self, folder: Path, dtype: np.dtype) -> list[tuple[Path, int, str]]:
        """(path, bytes, sha256) of both files, tokens first."""
        return [
            (tokens_path(folder, self.name), self.tokens * dtype.itemsize, self.tokens_sha256),
            (offsets_path(folder, self.name), (self.documents + 1) * OFFSET.itemsize, self.offsets_sha256),
        ]


def tokens_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens"


def offsets_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.offsets"


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def roll(digest: str, documents: list[np.ndarray]) -> str:
    """The hash (hex, 128 bits) of a sequence of documents, from the one before them ("" before the first). It knows
    nothing of shards, so equal documents have equal hashes however they are cut into files."""
    for ids in documents:
        digest = hashlib.blake2b(bytes.fromhex(digest) + ids.tobytes(), digest_size=16).hexdigest()
    return digest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` in one step: after a crash it holds the old text or the new, on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
