"""Reads prepared tokens by memory map: many shards that look like one store."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sieve.data.cache import cache_root, locked
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.progress import Progress
from sieve.data.shard_files import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    OFFSET,
    TOKENIZER,
    Shard,
    dtype_of,
    sha256,
    write_json,
)
from sieve.data.tokenizer import Encoder
from sieve.data.tokenizer_export import given_tokenizer, saved

logger = logging.getLogger(__name__)

KEYS_OF_TEXT = (  # that shards were made by
    "validation_fraction", "min_bytes", "max_bytes", "max_document_bytes", "format", "text_field", "split",
)
HASHERS = 4  # threads; a disk is slower than so many


class ShardedStore:
    """The part `part` of a folder of shards, with the interface of TokenStore.

    num_documents, num_tokens: counts. id: hex, equal for equal documents in equal order, however they are cut into
    shards. A document is found by bisection of the shards' beginnings and one look into its shard's offsets. Files are
    mapped when they are first touched.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], part: str, *, trusted: bool = True):
        """trusted: documents are as they were written; if not, each is looked through for ids that the tokenizer has not."""
        about = manifest["parts"][part]
        self._limit = None if trusted else manifest["tokenizer"]["vocab_size"]
        self.folder, self.manifest = folder / part, about
        self._dtype = dtype_of(manifest["tokenizer"]["vocab_size"])
        self.shards = [Shard(**shard) for shard in about["shards"]]
        self._first = list(accumulate((shard.documents for shard in self.shards), initial=0))
        self._maps: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(self.shards)
        self.num_documents: int = self._first[-1]
        self.num_tokens = sum(shard.tokens for shard in self.shards)
        self.id: str = about["hash"]

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` with its bos and eos: a view [length] of the map, in the store's dtype. ValueError for one
        of a store that is not trusted if it cannot be what was written."""
        tokens, offsets, i = self._at(index)
        ids = tokens[offsets[i] : offsets[i + 1]]
        if self._limit is not None and (not ids.size or ids.max() >= self._limit):
            found = f"has the token {ids.max()}, of a vocabulary of {self._limit}" if ids.size else "is empty"
            raise ValueError(f"{self.folder} is damaged: document {index} {found}; data.verify=once tells which file it is")
        return ids

    def length(self, index: int) -> int:
        """Tokens of document `index`."""
        _, offsets, i = self._at(index)
        return int(offsets[i + 1] - offsets[i])

    def files(self) -> list[tuple[Path, int, str]]:
        """(path, bytes, sha256) of every file, as the manifest says."""
        return [file for shard in self.shards for file in shard.files(self.folder, self._dtype)]

    def _at(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is outside of {self.num_documents} documents")
        number = bisect_right(self._first, index) - 1
        maps = self._maps[number]
        if maps is None:
            (tokens, _, _), (offsets, _, _) = self.shards[number].files(self.folder, self._dtype)
            # A plain array on the map: slices of np.memmap itself cost several times as much.
            maps = np.memmap(tokens, self._dtype, "r").view(np.ndarray), np.memmap(offsets, OFFSET, "r").view(np.ndarray)
            self._maps[number] = maps
        return *maps, index - self._first[number]


def open_shards(data: DataConfig, tokenizer: TokenizerConfig) -> tuple[Encoder, ShardedStore, ShardedStore]:
    """The tokenizer, training and validation store of data.paths, verified as data.verify says.

    Raises ValueError, naming the folder or file: if it is none or unfinished, if a shard's size or checksum is not the
    manifest's, or if the run's own tokenizer (tokenizer.path) is another than that of the shards.
    """
    if len(data.paths) != 1:
        raise ValueError(f"data.paths={list(data.paths)}: data=shards reads one folder, as {data.name} of sieve prepare")
    folder = Path(data.paths[0]).expanduser()
    manifest = read_manifest(folder)
    encoder = saved(folder / TOKENIZER, manifest["tokenizer"])
    given = given_tokenizer(tokenizer)
    if given is not None and given.hash != encoder.hash:
        raise ValueError(
            f"data.paths={folder} was made with the tokenizer {encoder.hash}, and tokenizer.path={tokenizer.path} is "
            f"{given.hash}; leave tokenizer.path out to use the shards' own, or prepare the text with this one"
        )
    if given is None:
        _warn_of_others(tokenizer, encoder, folder)
    _warn_of_choices(data, folder)
    trusted = data.verify != "never"
    train, validation = (ShardedStore(folder, manifest, part, trusted=trusted) for part in ("train", "validation"))
    verify(folder, [*train.files(), *validation.files()], data.verify, data.cache_dir)
    return encoder, train, validation


def _warn_of_others(config: TokenizerConfig, encoder: Encoder, folder: Path) -> None:
    """Where `config` asks for a tokenizer to be trained, which shards cannot be read with. No error, since presets ask too; and
    not where its vocabulary is as large as that of the shards, which then were made as it says, for all that is known."""
    fields = TokenizerConfig.model_fields
    others = {key: value for key, value in config if key != "name" and value != fields[key].default}
    if others and config.vocab_size != encoder.vocab_size:
        told = ", ".join(f"tokenizer.{key}={value}" for key, value in others.items())
        logger.warning(
            "no effect has %s: the shards in %s bring the tokenizer they were made with, of %d pieces", told, folder,
            encoder.vocab_size,
        )


def _warn_of_choices(data: DataConfig, folder: Path) -> None:
    """Where `data` says which text to read or how to part it. No error, since a run that was trained so has to open again."""
    fields = type(data).model_fields
    told = [f"data.{key}={getattr(data, key)}" for key in KEYS_OF_TEXT if getattr(data, key) != fields[key].default]
    if told:
        logger.warning(
            "no effect has %s: `sieve prepare` chose and split the documents in %s; prepare the text anew with it",
            ", ".join(told), folder,
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder. ValueError if there is none, with what is there instead."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        if (folder / JOURNAL).exists():
            raise ValueError(f"{folder} is not finished; the same `sieve prepare` goes on with it") from error
        there = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else None
        found = "it does not exist" if there is None else f"it has {', '.join(there) or 'nothing'}"
        raise ValueError(f"{folder} is no folder of `sieve prepare` ({MANIFEST}: {error}); {found}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}; prepare it anew")
    return manifest


def verify(
    folder: Path, files: list[tuple[Path, int, str]], when: Literal["once", "always", "never"], cache_dir: str | None
) -> None:
    """ValueError for the first file that is not as the manifest says: its size always, its checksum as `when` says.

    once: what was right on this machine, at the same size and time of change, is not read again. Of several processes
    one reads and the others wait.
    """
    for path, size, _ in files:
        found = path.stat().st_size if path.exists() else -1
        if found != size:
            raise ValueError(f"{path} has {found} bytes instead of {size} (-1: absent); prepare it anew or copy it again")
    if when == "never":
        return
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=10).hexdigest()
    stamps = cache_root(cache_dir) / "verified" / f"{name}.json"
    with locked(stamps):
        known = json.loads(stamps.read_text()) if when == "once" and stamps.exists() else {}
        todo = [file for file in files if known.get(str(file[0].resolve())) != _stamp(*file)]
        if todo:
            _compare(todo, folder)
            write_json(stamps, known | {str(file[0].resolve()): _stamp(*file) for file in todo})


def _stamp(path: Path, size: int, expected: str) -> list[Any]:
    return [size, path.stat().st_mtime_ns, expected]


def _compare(files: list[tuple[Path, int, str]], folder: Path) -> None:
    total, done = sum(size for _, size, _ in files) or 1, 0
    with Progress(f"verifying {folder}", unit="bytes") as bar, ThreadPoolExecutor(HASHERS) as pool:
        for number, ((path, size, expected), found) in enumerate(zip(files, pool.map(sha256, [f[0] for f in files]))):
            if found != expected:
                pool.shutdown(wait=False, cancel_futures=True)
                raise ValueError(
                    f"{path} is damaged: sha256 {found} instead of {expected}; prepare it anew or copy it again"
                )
            done += size
            bar.update(done / total, number + 1, done)
