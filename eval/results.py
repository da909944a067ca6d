"""results.json: what was measured of a model, task by task, by one evaluation or by several."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sieve.data.disk import writing
from sieve.eval.runner import Result

FILE = "results.json"
_BROKEN_DOWN = re.compile(r"_(pos|len|pairs)_\d+$")


@dataclass(frozen=True)
class Measured:
    """A task's result, and about: what was run, on what, when it was measured; JSON-able."""

    result: Result
    about: dict[str, Any]


def overall(result: Result) -> dict[str, float]:
    """Its metrics that are not a line of its tables as well: of the whole task, by the name they have in results.json."""
    if result.task == "harness":  # its table is its metrics
        return {}
    by_source = {f"eval/{row['source']}/loss" for row in result.tables.get("loss by source", ())}
    return {k: v for k, v in result.metrics.items() if not _BROKEN_DOWN.search(k) and k not in by_source}


def read_results(folder: Path) -> dict[str, Measured]:
    """What results.json in `folder` holds, by task; nothing where there is none. ValueError when it cannot be read."""
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {task: _measured(task, dict(entry), data) for task, entry in data["tasks"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no results of `sieve eval` ({type(error).__name__}: {error}), so none can be added to it; move it "
            "away, or give another folder with out="
        ) from error


def write_results(results: Sequence[Result], folder: Path, about: dict[str, Any]) -> dict[str, Measured]:
    """Put `results` into results.json, which a rename puts in its place: each replaces what was there of its task, and tasks
    that were not measured now stay. All that it holds then, by task. about: as in Measured. ValueError as read_results."""
    there = read_results(folder) | {result.task: Measured(result, about) for result in results}
    data = {
        "about": about,
        "metrics": {name: value for m in there.values() for name, value in m.result.metrics.items()},
        "tasks": {task: _entry(m) for task, m in there.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    unfinished = path.with_suffix(".json.tmp")
    with writing(path):
        unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    return there


def _entry(measured: Measured) -> dict[str, Any]:
    r = measured.result
    return {
        "about": measured.about, "metrics": r.metrics, "tables": r.tables, "chance": r.chance, "seconds": r.seconds,
        "note": r.note, **r.extra,
    }


def _measured(task: str, entry: dict[str, Any], data: dict[str, Any]) -> Measured:
    """The opposite of _entry. Files of the first version say what was run once, and metrics without their task."""
    about, metrics = entry.pop("about", data["about"]), entry.pop("metrics", {})
    known = {name: entry.pop(name) for name in ("tables", "chance", "seconds", "note")}
    return Measured(Result(task, metrics=metrics, extra=entry, **known), about)
