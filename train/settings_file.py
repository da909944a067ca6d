"""A user's own YAML file of settings, as the overrides that say the same on a command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def overrides_of(path: Path) -> list[str]:
    """KEY=VALUE of every setting in the YAML file `path`, in its order: keys nested or dotted, a word for a group is its
    choice. What --cfg job prints, and a run's config.yaml, are such files. ValueError where it is none."""
    try:
        tree = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise ValueError(f"must hold KEY: VALUE lines, not {type(tree).__name__}")
    return [f"{key}={_written(value)}" for key, value in _flat(tree, "")]


def _flat(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(value: Any) -> str:
    """As Hydra's grammar has it: text in quotes, so that it stays text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value).replace("\\", "\\\\") if str(value).endswith("\\") else str(value)
    return "'" + text.replace("'", "\\'") + "'"
