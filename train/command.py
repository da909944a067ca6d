"""What every command of Hydra-like overrides does the same way: help, --cfg job, and the answer to a mistake."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

C = TypeVar("C", bound="BaseModel")


def run_command(
    program: str, arguments: Sequence[str], *, load: Callable[[list[str]], C], run: Callable[[C], int],
    help_text: Callable[[], str],
) -> int:
    """Load the settings that `arguments` describe and run them; `run`'s exit code, 0 after --help or --cfg job, 2 after
    a message for a user's mistake, 130 after a Ctrl-C that `run` did not handle."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return 0
    try:
        show, overrides = _split(arguments)
        config = load(overrides)
        if show:
            import yaml

            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        return run(config)
    except ValueError as error:
        if not is_for_the_user(error):
            raise
        for line in str(error).splitlines():
            print(f"{program}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def describe_keys(usage: str, model: type[BaseModel], root: str) -> str:
    """`usage`, then every group of the YAML file `root` with its choices and every key with its default, as they are
    at this moment."""
    from sieve.train.overrides import config_groups

    lines = [usage, "Groups:"]
    lines += [f"  {group + '=':13} {' | '.join(choices)}" for group, choices in config_groups(root).items()]
    lines += ["", "Keys, with their defaults (a group's choice may set others):", *key_lines(model)]
    return "\n".join(lines) + "\n"


def key_lines(model: type[BaseModel]) -> list[str]:
    """A line, or two, for each key of `model`: its default, its kind, what it is for."""
    from sieve.train.schema import keys, shown

    lines = []
    for key in keys(model):
        text = f"  {key.path}={shown(key.default)}"
        about = f"{key.kind}; {key.description}" if key.description else key.kind
        lines.append(f"{text:44} {about}" if len(text) < 44 else f"{text}\n{'':44} {about}")
    return lines


def log_to_stderr(level: int) -> None:
    """Print this package's log records of `level` and above as plain lines."""
    logger = logging.getLogger("sieve")
    logger.setLevel(level)
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


class _Stderr(logging.Handler):
    """Plain lines on whatever sys.stderr is at the time: a progress bar replaces it to stay below them."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def is_for_the_user(error: ValueError) -> bool:
    """Whether our own code raised it: then its text says all there is to know. From anything else it is a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("sieve.")


def check_folder(folder: Path, given: str) -> None:
    """ValueError, which begins with `given`, unless files can be written into `folder`, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{given}: {there} is a file, and a folder is needed; give another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: {there} cannot be written to; give another folder")


def _split(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether --cfg job is given, and the rest. ValueError for another --cfg."""
    rest = list(arguments)
    if "--cfg" not in rest:
        return False, rest
    at = rest.index("--cfg")
    if rest[at + 1 : at + 2] != ["job"]:
        raise ValueError(f"--cfg {' '.join(rest[at + 1 : at + 2])}: only --cfg job is there")
    return True, rest[:at] + rest[at + 2 :]
