"""The text that every machine has: the Python sources of the running interpreter and of its installed packages."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from sieve.data.document import Document, size_of

# Caches, packages under the standard library (which come under their own root), and this project itself, whose own
# changes must not change what it trains on.
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
SKIPPED_AT_TOP = ("sieve", "sieve_lm", "__editable__")


def interpreter_roots() -> dict[str, str]:
    """Folders of Python sources of this interpreter, by the label that begins their documents' ids."""
    return {"stdlib": sysconfig.get_path("stdlib"), "packages": sysconfig.get_path("purelib"),
            "platform-packages": sysconfig.get_path("platlib")}


class PythonSource:
    """One document a .py file of `roots`, without duplicates, in an order set by the hash of each file's path under its
    root: not by time or by how folders are listed. Two runs on one machine get the same.

    Files under `min_bytes`, not in UTF-8 or equal to an earlier one are left out; after `max_bytes` of text it ends.
    """

    def __init__(self, *, min_bytes: int, max_bytes: int | None, roots: Mapping[str, str] | None = None):
        """roots: label to folder; None: the running interpreter's. Raises ValueError if there is no .py file."""
        self._roots = interpreter_roots() if roots is None else dict(roots)
        self._min_bytes, self._max_bytes = min_bytes, max_bytes
        self.done, self._undecodable, self._repeated = 0.0, 0, 0
        self.cursor: dict[str, int] = {}
        self.description: dict[str, Any] = {
            "type": "python", "python": platform.python_version(), "roots": self._roots, "files": len(self._files),
            "min_bytes": min_bytes, "max_bytes": max_bytes,
        }
        if not self._files:
            raise ValueError(
                f"data.type=python: no .py file in {', '.join(self._roots.values())}; this Python comes without its "
                "sources: choose data=files"
            )

    def __iter__(self) -> Iterator[Document]:
        return self.after({})

    def after(self, cursor: dict[str, int]) -> Iterator[Document]:
        """As in Source. Files before the cursor are read again, to know which later ones repeat them."""
        passed = cursor.get("documents", 0)
        seen: set[bytes] = set()
        self._undecodable = self._repeated = taken = index = 0
        for place, (name, path, size, _) in enumerate(self._files):
            self.done = max(place / len(self._files), taken / (self._max_bytes or float("inf")))
            if size < self._min_bytes:
                continue
            with open(path, "rb") as file:
                data = file.read()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in seen:
                self._repeated += 1
                continue
            seen.add(digest)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                self._undecodable += 1
                continue
            self.cursor = {"documents": index + 1}
            if index >= passed:
                yield Document(name, text, index)
            index, taken = index + 1, taken + len(data)
            if self._max_bytes is not None and taken >= self._max_bytes:
                return

    def sample(self, max_bytes: int) -> Iterator[Document]:
        """As in Source: the beginning, for the order is random already."""
        for document in self:
            yield document
            max_bytes -= size_of(document.text)
            if max_bytes <= 0:
                return

    def fingerprint(self) -> str:
        """As in Source: of every file's path, size and time of change, for reading them all would take longer than it
        is worth."""
        digest = hashlib.blake2b(repr((self._min_bytes, self._max_bytes)).encode(), digest_size=16)
        for name, _, size, changed in self._files:
            digest.update(f"{name}\0{size}\0{changed}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def skipped(self) -> str:
        """As in Source."""
        return f"{self._repeated} repeated and {self._undecodable} not in UTF-8"

    @cached_property
    def _files(self) -> list[tuple[str, str, int, int]]:
        """(id, path, bytes, time of change in ns) of every file, in the order of documents."""
        visited: set[tuple[int, int]] = set()
        found = [file for label, root in self._roots.items() for file in _walk(root, label, visited, top=True)]
        return sorted(found, key=lambda f: hashlib.blake2b(f[0].encode(errors="surrogateescape")).digest())


def _walk(
    folder: str, name: str, visited: set[tuple[int, int]], top: bool = False
) -> Iterator[tuple[str, str, int, int]]:
    """Files under `folder`, links followed, each folder once however many ways lead to it."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        return  # a root that is not there, or a folder that may not be read, has nothing for us
    for entry in entries:
        if entry.name.startswith(".") or top and entry.name.startswith(SKIPPED_AT_TOP):
            continue
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS:
                yield from _walk(entry.path, f"{name}/{entry.name}", visited)
        elif entry.name.endswith(".py") and entry.is_file():
            status = entry.stat()
            yield f"{name}/{entry.name}", entry.path, status.st_size, status.st_mtime_ns
