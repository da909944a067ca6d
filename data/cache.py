"""Folders that are whole or absent: built beside their place, synced, and moved there in one step."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sieve.data.disk import writing

logger = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """The folder for tokenizers and token stores, made if absent: `cache_dir`, else $XDG_CACHE_HOME/sieve, else
    ~/.cache/sieve. Raises ValueError if nothing can be written there."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(cache_dir if cache_dir else os.path.join(base, "sieve")).expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ValueError(f"data.cache_dir={root} cannot be written ({error.strerror}); set data.cache_dir") from error
    return root


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one process at a time build `target` and what begins with its name. The system frees the lock of a process
    that dies; what such a process left half-built is removed here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=2)
    except Timeout:
        logger.info("another process is building %s; waiting for it", target)
        lock.acquire()
    try:
        for left_over in target.parent.glob(f"{target.name}*.tmp-*"):
            logger.info("removing %s, left by a build that was cut short", left_over)
            shutil.rmtree(left_over, ignore_errors=True)
        yield
    finally:
        lock.release()


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well and vanishes when it does not.

    Files are on the disk before the name is: a crash leaves the whole folder or none. A `target` that another
    process put there meanwhile is kept, for it was built from the same key.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        with writing(target):
            yield folder
            for path in (*folder.iterdir(), folder):
                _sync(path)
        folder.chmod(0o755)  # mkdtemp's own mode would lock other users out of a shared cache
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
