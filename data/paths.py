"""From what a user writes as paths to a list of files in a fixed order, or an error that says what is there instead."""

from __future__ import annotations

import difflib
import glob
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sieve.data.files import File, Format, LocalFile, format_of, unknown_format
from sieve.data.remote import Remote, is_url

logger = logging.getLogger(__name__)

_SHOWN = 8


def expand(entries: Sequence[str], forced: Format | None, key: str, remote: Remote | None = None) -> list[File]:
    """Every file of `entries` once, with its format: entries in order, a glob's or a folder's files sorted by name.

    forced: the format whatever the name. key: the setting's name, for messages. remote: how URLs are reached. A folder
    is searched to its bottom; files in it that are hidden or of no known format are left out. Raises ValueError if an
    entry names nothing, or a file whose format its name does not tell.
    """
    if not entries:
        raise ValueError(f"{key} is empty; give files, folders or globs, as in {key}=texts/*.jsonl.zst")
    if any(not entry.strip() for entry in entries):
        raise ValueError(f"{key}={list(entries)} has an empty entry, which would be the folder that one is in; '.' says so")
    found: dict[str, File] = {}
    for entry in entries:
        files = (remote or Remote()).expand(entry, forced, key) if is_url(entry) else _local(entry, forced, key)
        for file in files:
            found.setdefault(file.key, file)
    return list(found.values())


def _local(entry: str, forced: Format | None, key: str) -> list[File]:
    path = Path(entry).expanduser()
    if path.is_dir():
        files = _in_folder(path, forced, key)
    elif path.is_file():
        files = [path]
    else:
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise ValueError(f"{key}: {entry!r} {_nothing(path)}")
    kinds = [forced or format_of(file) for file in files]
    if None in kinds:
        raise ValueError(unknown_format(str(files[kinds.index(None)]), key))
    return [LocalFile(file, kind) for file, kind in zip(files, kinds)]


def _in_folder(folder: Path, forced: Format | None, key: str) -> list[Path]:
    files = [
        p for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    known = [p for p in files if forced or format_of(p)]
    if not known:
        kinds = Counter("".join(p.suffixes[-2:]) or "no suffix" for p in files)
        what = ", ".join(f"{n} of {suffix}" for suffix, n in kinds.most_common(_SHOWN)) or "no files"
        hint = " (data.format=text forces it)" if key.startswith("data.") else ""
        raise ValueError(f"{key}: the folder {folder} has {what}; none of a known format{hint}")
    if len(known) < len(files):
        logger.info("%s: %d files of other formats are left out", folder, len(files) - len(known))
    return known


def _nothing(path: Path) -> str:
    """Why `path` names no file: the deepest folder of it that exists, and what there comes closest."""
    magic = glob.has_magic(str(path))
    folder = path.parent
    missing = path.name
    while not folder.is_dir():
        folder, missing = folder.parent, folder.name
    said = "matches no file" if magic else "does not exist"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    if close:
        return f"{said}; closest in {folder.resolve()}: {', '.join(close)}"
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"{said}; {folder.resolve()} has {shown or 'nothing'}"
