"""Token ids of many documents in one memory-mapped file, with where each begins and a manifest that proves both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = 1  # raise it when the files, or the ids of the same text and tokenizer, change
CHECKSUM_LIMIT = 64 << 20  # bytes: a second at worst; larger files are checked by size, or on demand
_FILES = ("tokens.bin", "offsets.bin")


class TokenStore:
    """A read-only store: tokens.bin (uint16 or uint32, little-endian, flat), offsets.bin (int64 [documents + 1]).

    num_documents, num_tokens: counts. id: hex, equal for equal tokens and offsets. manifest: what StoreWriter wrote.
    """

    def __init__(self, folder: Path | str, *, checksum: bool | None = None):
        """Opens and verifies `folder`. checksum: compare the files' sha256; None: of those up to 64 MiB.

        Raises ValueError if the folder is not a whole store, naming what is wrong.
        """
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} is no token store: manifest.json: {error}") from error
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{self.folder} has format {self.manifest.get('format')}, this version reads {FORMAT}")
        for name in _FILES:
            self._verify(name, checksum)
        self._tokens = np.asarray(np.memmap(self.folder / "tokens.bin", np.dtype(self.manifest["dtype"]), "r"))
        self._offsets = np.asarray(np.memmap(self.folder / "offsets.bin", np.dtype("<i8"), "r"))
        self.num_documents, self.num_tokens = len(self._offsets) - 1, len(self._tokens)
        if self._offsets[0] != 0 or self._offsets[-1] != self.num_tokens:
            raise ValueError(f"{self.folder}: offsets end at {self._offsets[-1]}, there are {self.num_tokens} tokens")
        self.id = hashlib.sha256("".join(self.manifest["files"][f]["sha256"] for f in _FILES).encode()).hexdigest()[:32]

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` with its bos and eos: a view [length] of the map, in the store's dtype."""
        return self._tokens[self._offsets[index] : self._offsets[index + 1]]

    def length(self, index: int) -> int:
        """Tokens of document `index`."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def _verify(self, name: str, checksum: bool | None) -> None:
        path, expected = self.folder / name, self.manifest["files"][name]
        size = path.stat().st_size if path.exists() else -1
        if size != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes instead of {expected['bytes']} (-1: absent)")
        if checksum or checksum is None and size <= CHECKSUM_LIMIT:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected["sha256"]:
                raise ValueError(f"{path} is damaged: sha256 {found} instead of {expected['sha256']}")


class StoreWriter:
    """Writes a store's files into an existing folder, one document at a time; `finish` makes it whole.

    vocab_size chooses the dtype: uint16 up to 65536 ids, else uint32.
    """

    def __init__(self, folder: Path | str, vocab_size: int):
        self._folder = Path(folder)
        self._dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self._vocab_size = vocab_size
        self._files = {name: (open(self._folder / name, "wb"), hashlib.sha256()) for name in _FILES}
        self.num_documents = self.num_tokens = 0
        self._append("offsets.bin", np.zeros(1, "<i8"))

    def add(self, documents: Sequence[np.ndarray]) -> None:
        """Append documents: integer arrays, at least one token each."""
        if not documents:
            return
        lengths = np.array([len(ids) for ids in documents], "<i8")
        flat = np.concatenate(documents)
        if lengths.min() < 1 or flat.min() < 0 or flat.max() >= self._vocab_size:
            raise ValueError(f"a document is empty or has ids outside of [0, {self._vocab_size})")
        self._append("tokens.bin", flat.astype(self._dtype))
        self._append("offsets.bin", self.num_tokens + np.cumsum(lengths))
        self.num_documents += len(documents)
        self.num_tokens += len(flat)

    def finish(self, **about: Any) -> None:
        """Close the files and write the manifest; `about` (JSON-able) describes where the tokens come from.

        Raises ValueError if no document was added.
        """
        self.close()
        if not self.num_documents:
            raise ValueError("a token store needs at least one document")
        files = {
            name: {"bytes": (self._folder / name).stat().st_size, "sha256": digest.hexdigest()}
            for name, (_, digest) in self._files.items()
        }
        manifest = {
            "format": FORMAT, "dtype": self._dtype.str, "vocab_size": self._vocab_size,
            "documents": self.num_documents, "tokens": self.num_tokens, **about, "files": files,
        }
        (self._folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    def close(self) -> None:
        """Close the files; without `finish`, what they hold is not a store."""
        for file, _ in self._files.values():
            file.close()

    def _append(self, name: str, array: np.ndarray) -> None:
        file: BinaryIO
        file, digest = self._files[name]
        data = array.tobytes()
        file.write(data)
        digest.update(data)
