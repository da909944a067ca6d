"""Writes one part of a prepared text as shards, in such a way that a killed writer goes on where it was last saved."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sieve.data.shard_files import OFFSET, Shard, dtype_of, offsets_path, roll, sync_folder, tokens_path

_COPY = 8 << 20


class ShardWriter:
    """Appends documents to FOLDER/00000.tokens and so on; a shard ends with the document that fills it.

    `state`, taken after `sync`, is all that a later writer needs: it cuts the open files back to it, removes later
    ones, and goes on, so that the files come out as if there had been one writer. num_documents, num_tokens: so far.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int, state: dict[str, Any] | None = None):
        """Raises ValueError if the files that `state` speaks of are not there or too short."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._vocab_size, self._limit = folder, vocab_size, shard_tokens
        self._dtype = dtype_of(vocab_size)
        state = state or {"shards": [], "open": {"documents": 0, "tokens": 0}, "hash": ""}
        self._shards = [Shard(**shard) for shard in state["shards"]]
        self._hash: str = state["hash"]
        self._documents: int = state["open"]["documents"]
        self._tokens: int = state["open"]["tokens"]
        self.num_documents = self._documents + sum(shard.documents for shard in self._shards)
        self.num_tokens = self._tokens + sum(shard.tokens for shard in self._shards)
        self._check_finished()
        self._open()

    @property
    def state(self) -> dict[str, Any]:
        """JSON-able; true of the disk after `sync`."""
        return {
            "shards": [asdict(shard) for shard in self._shards],
            "open": {"documents": self._documents, "tokens": self._tokens}, "hash": self._hash,
        }

    def add(self, documents: list[np.ndarray]) -> None:
        """Append documents: integer arrays of ids in [0, vocab_size), at least one each, else ValueError."""
        for ids in documents:
            if not len(ids) or ids.min() < 0 or ids.max() >= self._vocab_size:
                raise ValueError(f"a document is empty or has ids outside of [0, {self._vocab_size})")
        documents = [ids.astype(self._dtype, copy=False) for ids in documents]
        self._hash = roll(self._hash, documents)
        for ids in documents:
            self._write(0, ids.tobytes())
            self._tokens += len(ids)
            self._documents += 1
            self._write(1, np.array([self._tokens], OFFSET).tobytes())
            self.num_documents, self.num_tokens = self.num_documents + 1, self.num_tokens + len(ids)
            if self._tokens >= self._limit:
                self._finish_shard()
                self._open()

    def sync(self) -> None:
        """Return when everything added is on the disk."""
        for file, _ in self._files:
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)

    def finish(self) -> dict[str, Any]:
        """Close the last shard; JSON-able {documents, tokens, hash, shards} for the manifest."""
        if self._documents:
            self._finish_shard()
        else:
            self.close()
            for path in self._paths():
                path.unlink()
        sync_folder(self._folder)
        return {
            "documents": self.num_documents, "tokens": self.num_tokens, "hash": self._hash,
            "shards": [asdict(shard) for shard in self._shards],
        }

    def close(self) -> None:
        """Close the files as they are."""
        for file, _ in self._files:
            file.close()

    def _paths(self) -> tuple[Path, Path]:
        name = f"{len(self._shards):05d}"
        return tokens_path(self._folder, name), offsets_path(self._folder, name)

    def _open(self) -> None:
        """The files of the current shard at its state, which is empty but for a writer that goes on."""
        self._files = []
        sizes = (self._tokens * self._dtype.itemsize, (self._documents + 1) * OFFSET.itemsize)
        for path, size in zip(self._paths(), sizes):
            digest = hashlib.sha256()
            if self._documents:
                file = path.open("r+b") if path.exists() else None
                if file is None or os.fstat(file.fileno()).st_size < size:
                    raise ValueError(f"{path} is shorter than the {size} bytes that the journal says; remove "
                                     f"{self._folder.parent} and prepare anew")
                file.truncate(size)
                while block := file.read(_COPY):
                    digest.update(block)
            else:
                file = path.open("wb")
            self._files.append((file, digest))
        if not self._documents:
            self._write(1, np.zeros(1, OFFSET).tobytes())

    def _write(self, which: int, data: bytes) -> None:
        file, digest = self._files[which]
        file.write(data)
        digest.update(data)

    def _finish_shard(self) -> None:
        self.sync()
        self.close()
        self._shards.append(Shard(
            f"{len(self._shards):05d}", self._documents, self._tokens, *(d.hexdigest() for _, d in self._files)
        ))
        self._documents = self._tokens = 0

    def _check_finished(self) -> None:
        """ValueError unless every finished shard is there; removes files that come behind the current one."""
        expected = {path.name for path in self._paths()}
        for shard in self._shards:
            for path, size, _ in shard.files(self._folder, self._dtype):
                found = path.stat().st_size if path.exists() else -1
                if found != size:
                    raise ValueError(f"{path} has {found} bytes instead of {size} (-1: absent); remove "
                                     f"{self._folder.parent} and prepare anew")
                expected.add(path.name)
        for path in self._folder.iterdir():
            if path.name not in expected:
                path.unlink()
