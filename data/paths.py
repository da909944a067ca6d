"""From what a user writes as paths to a list of files in a fixed order, or an error that says what is there instead."""

from __future__ import annotations

import difflib
import glob
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

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
_SHOWN = 8


def format_of(path: Path) -> Format | None:
    """The format that a file's name tells, or None."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix.lower()
    for kind, suffixes in SUFFIXES.items():
        if suffix in suffixes and not (kind == "parquet" and path.suffix in COMPRESSION):
            return kind
    return None


def expand(entries: Sequence[str], forced: Format | None, key: str) -> list[tuple[Path, Format]]:
    """Every file of `entries` once, with its format: entries in order, a glob's or a folder's files sorted by name.

    forced: the format whatever the name. key: the setting's name, for messages. A folder is searched to its bottom;
    files in it that are hidden or of no known format are left out. Raises ValueError if an entry names nothing, or a
    file whose format its name does not tell.
    """
    if not entries:
        raise ValueError(f"{key} is empty; give files, folders or globs, as in {key}=texts/*.jsonl.zst")
    found: dict[Path, tuple[Path, Format]] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            files = _in_folder(path, forced, key)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not files:
                raise ValueError(f"{key}: {entry!r} {_nothing(path)}")
        for file in files:
            kind = forced or format_of(file)
            if kind is None:
                known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
                raise ValueError(
                    f"{key}: {file} is of no known format; known are {known}, text and JSON lines also with "
                    f"{' or '.join(COMPRESSION)} behind; data.format=text reads any file as text"
                )
            found.setdefault(file.resolve(), (file, kind))
    return list(found.values())


def _in_folder(folder: Path, forced: Format | None, key: str) -> list[Path]:
    files = [
        p for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    known = [p for p in files if forced or format_of(p)]
    if not known:
        kinds = Counter("".join(p.suffixes[-2:]) or "no suffix" for p in files)
        what = ", ".join(f"{n} of {suffix}" for suffix, n in kinds.most_common(_SHOWN)) or "no files"
        raise ValueError(f"{key}: the folder {folder} has {what}; none of a known format (data.format=text forces it)")
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
