"""A disk that takes no more, in words: what write(2) raises says why it failed, and not which file."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A refusal by the disk within this block names `path`, where it names no file itself."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)$", str(error))  # tokenizers' own, in Rust, have this in their text alone
        if found is None or int(found[1]) not in REFUSALS:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def is_refusal(error: OSError) -> bool:
    """Whether file and reason say all there is to know, as of a user's own disk; another error is a bug, or not of a disk."""
    return error.filename is not None or error.errno in REFUSALS


def told(error: OSError) -> str:
    """The file, the reason, and on a full disk how much is free."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return reason
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            path = Path(error.filename).absolute()
            there = next(folder for folder in (path, *path.parents) if folder.is_dir())
            reason += f"; {shutil.disk_usage(there).free / 1e6:.1f} MB are free in {there}"
    return f"{error.filename}: {reason}"
