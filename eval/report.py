"""An evaluation as tables in the terminal, and as one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table

from sieve.eval.plots import plot
from sieve.eval.results import Measured, overall
from sieve.eval.runner import Result

_COLUMNS = 8  # a wider table is turned over in the terminal
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem } img { max-width: 100% }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: right;
  border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
.small { color: #555; font-size: .87rem; overflow-wrap: anywhere }
</style></head><body>
<h1>$title</h1>
$parts
<h2>How it was made</h2>
$about
</body></html>
""")


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_result(result: Result, terminal: Console) -> None:
    """Its overall numbers, tables, chance and notes."""
    if line := _overall(result):
        terminal.print(f"{result.task}: {line}", markup=False, highlight=False, style="bold")
    for name, rows in result.tables.items():
        if not rows:
            continue
        lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
        if len(rows[0]) > _COLUMNS:  # one line a number instead
            lines = [list(line) for line in zip(*lines)]
        grid = Table(title=f"{name} ({result.seconds:.1f} s)", title_justify="left")
        for column in lines[0]:
            grid.add_column(column, justify="right", overflow="fold")
        for line in lines[1:]:
            grid.add_row(*line)
        terminal.print(grid)
    if result.chance is not None:
        terminal.print(f"Chance: {result.chance:.4f}")
    if result.note:
        terminal.print(f"Note: {result.note}", markup=False, style="yellow")


def write_report(measured: Mapping[str, Measured], folder: Path, title: str) -> list[Path]:
    """A PNG for each task that has one, and report.html; the files in that order. measured: of `write_results`, by task.
    title: the model's name; a task that was measured on another model, as a later step, is marked so."""
    files: list[Path] = []
    parts, made = [], dict[str, list[str]]()
    for task, (result, about) in ((task, (m.result, m.about)) for task, m in measured.items()):
        made.setdefault(json.dumps(about, default=str), []).append(task)
        name = about.get("model", title)
        parts.append(f"<h2>{escape(task)}</h2>")
        if name != title:
            parts.append(f'<p class="small">Measured on {escape(name)}.</p>')
        if line := _overall(result):
            parts.append(f"<p><b>{escape(line)}</b></p>")
        picture = folder / f"{task}.png"
        if plot(result, picture, name):
            files.append(picture)
            image = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{escape(task)}" src="data:image/png;base64,{image}">')
        parts += [_table(name, rows) for name, rows in result.tables.items() if rows]
        notes = [f"Chance: {result.chance:.4f}."] if result.chance is not None else []
        notes += [result.note] if result.note else []
        parts += [f'<p class="small">{escape(note)}</p>' for note in notes]
    how = [f'<p class="small">{escape(", ".join(tasks))}: {escape(about)}</p>' for about, tasks in made.items()]
    html = _PAGE.substitute(title=escape(title), parts="\n".join(parts), about="\n".join(how))
    files.append(folder / "report.html")
    files[-1].write_text(html, encoding="utf-8")
    return files


def _overall(result: Result) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in overall(result).items())


def _table(name: str, rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in rows[0])
    lines = ["".join(f"<td>{escape(shown(value))}</td>" for value in row.values()) for row in rows]
    return f"<h3>{escape(name)}</h3><table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
