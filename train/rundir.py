"""Reading a run directory back: its metrics, config and environment, as `sieve compare` and `baseline=` need them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

METRICS_FILE = "metrics.jsonl"
Row = dict[str, float | int | str]


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, one a step, steps ascending.

    A torn last line, which `kill -9` can leave, is dropped. Lines of the same step are merged, the later one winning.
    ValueError when another line is no JSON object with a `step`.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it: the writer was stopped in the middle of it
                break
            raise ValueError(f"{path}:{number} is not a metrics line ({error}): {line[:80]!r}") from error
    return [rows[step] for step in sorted(rows)]


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{'data': {'type': 'files', 'phases': [{'from_tokens': 0}]}} -> {'data.type': 'files',
    'data.phases[0].from_tokens': 0}; lists of anything but mappings stay whole, and mappings by number, as data.upsample."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not all(str(k).isdigit() for k in value):  # JSON has numbers as text there
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                flat.update(flatten(item, f"{prefix}{key}[{i}]."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Flat config keys whose values differ, each with (ours, theirs); a key one side lacks has None there."""
    plain = json.dumps  # tuples against YAML's lists, 1 against 1.0: compare what would be written
    keys = sorted(set(ours) | set(theirs))
    return {
        key: (ours.get(key), theirs.get(key))
        for key in keys
        if ours.get(key) != theirs.get(key) and plain(ours.get(key), default=str) != plain(theirs.get(key), default=str)
    }


@dataclass(frozen=True)
class RunFiles:
    """A run as its directory tells it. config: flat keys. environment: as environment.json has it, or empty."""

    directory: Path
    rows: list[Row]
    config: dict[str, object]
    environment: dict[str, object]

    @property
    def name(self) -> str:
        return self.directory.name

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """ValueError when there is no such run, or it has logged no training loss yet."""
        metrics = directory / METRICS_FILE
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a run directory: it does not exist{_close(directory)}")
        if not metrics.is_file():
            raise ValueError(f"{directory} has no {METRICS_FILE}: it is no run, or one that has not logged a step yet")
        rows = read_metrics(metrics)
        if not any("train/loss" in row and "tokens" in row for row in rows):
            raise ValueError(f"{metrics} holds no training loss yet; let the run log at least one step (log.every)")
        config, environment = directory / "config.yaml", directory / "environment.json"
        return cls(
            directory=directory,
            rows=rows,
            config=flatten(yaml.safe_load(config.read_text()) or {}) if config.is_file() else {},
            environment=json.loads(environment.read_text()) if environment.is_file() else {},
        )


def find_run(value: str | Path, runs_dir: Path) -> Path:
    """The directory a user means by `value`: a path, or the name of a run under `runs_dir`; ValueError if none."""
    for candidate in (Path(value), runs_dir / value):
        if candidate.is_dir():
            return candidate
    raise ValueError(f"{value} is neither a directory nor a run under {runs_dir}{_close(runs_dir / Path(value).name)}")


def _close(path: Path) -> str:
    """'; did you mean runs/a?' when a sibling of `path` has nearly its name, else the runs that are there."""
    if not path.parent.is_dir():
        return ""
    runs = sorted(p.parent.name for p in path.parent.glob(f"*/{METRICS_FILE}"))
    near = difflib.get_close_matches(path.name, runs, n=1)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    return f"; runs there: {', '.join(runs)}" if runs else ""
