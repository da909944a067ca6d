"""Needle maps of runs side by side, and how their validation losses fell: one picture of evaluated runs.

  python -m sieve.scripts.needle_maps maps.png runs/recall-full runs/recall-nsa

A run is there with what it has: results of `sieve eval RUN suite=needle` in RUN/report/eval, and metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sieve.eval.config import NEEDLES
from sieve.eval.plots import COLOURS, heat_map
from sieve.train.rundir import METRICS_FILE, Row, read_metrics
from sieve.train.text import short_count

Maps = dict[str, list[dict[str, Any]]]  # rows of `sieve eval` by task


def maps_of(run: Path) -> Maps:
    """The needle tasks that were measured of a run; none when it has no results. ValueError for a torn file."""
    path = run / "report" / "eval" / "results.json"
    if not path.is_file():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {task: tasks[task]["tables"][task] for task in NEEDLES if task in tasks}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no results of `sieve eval`: {error}") from error


def draw(runs: dict[str, tuple[Maps, list[Row]]], path: Path) -> None:
    """Write the PNG: a row of heat maps for each run that has some, then its validation losses, one panel a source."""
    measured = {name: maps for name, (maps, _) in runs.items() if maps}
    tasks = [task for task in NEEDLES if any(task in maps for maps in measured.values())]
    losses = sorted({key for _, rows in runs.values() for key in chain(*rows) if _is_loss(key)})
    columns = max(len(tasks), len(losses))
    figure = Figure(figsize=(1 + 3.6 * columns, 3.3 * (len(measured) + bool(losses))), dpi=110, layout="constrained")
    axes = figure.subplots(len(measured) + bool(losses), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for line, (name, maps) in zip(axes, measured.items()):
        for axis, task in zip(line, tasks):
            if task in maps:
                axis.set_visible(True)
                heat_map(axis, maps[task])
                axis.set_title(f"{name}: {task}", loc="left", fontsize=9)
    for axis, key in zip(axes[-1], losses):
        axis.set_visible(True)
        _losses(axis, key, {name: rows for name, (_, rows) in runs.items()})
    figure.savefig(path)


def _is_loss(key: str) -> bool:
    """Whether it is eval/SOURCE/loss, or eval/loss, which is over all sources."""
    return key == "eval/loss" or key.startswith("eval/") and key.endswith("/loss")


def _losses(axis: Axes, key: str, runs: dict[str, list[Row]]) -> None:
    for (name, rows), colour in zip(runs.items(), COLOURS):
        points = [(row["tokens"], row[key]) for row in rows if key in row and "tokens" in row]
        if points:
            axis.plot(*zip(*points), "o-", ms=3, color=colour, label=name)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axis.set_xlabel("training tokens")
    axis.set_ylabel("nats per token")
    source = key.removeprefix("eval/").removesuffix("loss").removesuffix("/")
    axis.set_title(f"validation loss: {source or 'all sources'}", loc="left", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after a message for a user's mistake."""
    parser = argparse.ArgumentParser(prog="needle_maps", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    options = parser.parse_args(argv)
    try:
        found = {
            run.name: (maps_of(run), read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else [])
            for run in options.runs
        }
        if not any(maps or any(map(_is_loss, chain(*rows))) for maps, rows in found.values()):
            raise ValueError(f"{', '.join(map(str, options.runs))}: neither results of `sieve eval` nor validation losses")
        draw(found, options.out)
    except (OSError, ValueError) as error:
        print(f"needle_maps: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
