"""Data sets of the Hugging Face Hub by name, or a local folder in the Hub's layout, as a list of files to stream.

The `datasets` library resolves what a name, a subset and a split mean (the card's `configs`, else names of folders and
files) and pins the commit; the files are then read by our own readers. Its own streams lose their place when they are
resumed twice or behind a buffer, and a cursor of files and records does not.
"""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sieve.data.files import File, Format, format_of

if TYPE_CHECKING:
    from sieve.data.config import DataConfig
    from sieve.data.remote import Remote

logger = logging.getLogger(__name__)


def hub_files(config: DataConfig, split: str, forced: Format | None, key: str, remote: Remote) -> list[File]:
    """The files of `split` of the data set in `config.repo`, in the data set's order.

    key: the setting that names the split, for messages. Raises ValueError if the data set, its subset or the split is
    not there, or if its files are of no format that is read here, naming what is there instead.
    """
    if config.repo is None:
        raise ValueError("data.type=hub reads data.repo; give a data set as data.repo=OWNER/NAME, or a local folder")
    # They import for a second, which other sources need not wait for.
    import datasets
    import datasets.exceptions

    from sieve.data.paths import expand

    named = f"data.repo={config.repo}" + (f" data.subset={config.subset}" if config.subset else "")
    try:
        builder = remote.patiently(
            lambda: datasets.load_dataset_builder(
                config.repo, config.subset, data_dir=config.data_dir, revision=config.revision
            ), f"looking up {config.repo}",
        )
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise ValueError(f"{named}: {_first_line(error)}") from error
    found = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    if split not in found:
        raise ValueError(f"{key}={split}: no such split in {named}; there are {', '.join(found) or 'none'}")
    entries = [str(file) for file in found[split]]
    unreadable = [e for e in entries if not (forced or format_of(PurePosixPath(e)))]
    if len(unreadable) == len(entries):
        raise ValueError(
            f"{named}: its files are of no known format, as {Path(unreadable[0]).name}; text, JSON lines and parquet "
            "are read"
        )
    readable = [e for e in entries if e not in set(unreadable)]
    logger.info("%s: %d files for %s, as %s", named, len(readable), split, readable[0])
    return expand(readable, forced, "data.repo", remote)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
