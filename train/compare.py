"""`sieve compare RUN BASELINE`: two runs as a table in the terminal, a PNG, an HTML report and comparison.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sieve.data.disk import writing
from sieve.train.command import check_folder
from sieve.train.comparison import Comparison, compare
from sieve.train.report import table, write_html
from sieve.train.rundir import RunFiles, find_run

_PNG, _HTML, _JSON = "comparison.png", "comparison.html", "comparison.json"


def write_comparison(run: RunFiles, baseline: RunFiles, folders: Sequence[Path]) -> Comparison:
    """Compare two runs and write PNG, HTML and JSON into each of `folders`, which are created."""
    from sieve.train.plots import plot_comparison  # matplotlib takes seconds to import, and --help needs none of it

    comparison = compare(run, baseline)
    first = folders[0]
    first.mkdir(parents=True, exist_ok=True)
    with writing(first):
        plot_comparison(run, baseline, comparison, first / _PNG)
        write_html(run, baseline, comparison, first / _PNG, first / _HTML)
        names = {"run": str(run.directory), "baseline": str(baseline.directory)}
        (first / _JSON).write_text(json.dumps(names | comparison.as_json(), indent=2) + "\n")
    for folder in folders[1:]:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder):
            for name in (_PNG, _HTML, _JSON):
                (folder / name).write_bytes((first / name).read_bytes())
    return comparison


def print_comparison(
    run: RunFiles, baseline: RunFiles, comparison: Comparison, folder: Path, terminal: Console
) -> None:
    """The table, what to beware of, and where the files lie."""
    grid = Table(title=f"{run.name} against {baseline.name}", title_justify="left")
    for header in ("", run.name, baseline.name, "difference"):
        grid.add_column(header, justify="left" if not header else "right", overflow="fold")
    for line in table(comparison):
        grid.add_row(*line)
    terminal.print(grid)
    if comparison.same_tokens:
        terminal.print(f"Both read the same tokens (equal hashes at {comparison.matched_steps} common steps).")
    for note in comparison.notes:
        terminal.print(f"Note: {note}", markup=False, style="yellow")
    for name in (_PNG, _HTML, _JSON):
        terminal.print(str(folder / name), markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 after a message when a run cannot be read or the files have no place."""
    parser = argparse.ArgumentParser(prog="sieve compare", description=__doc__)
    parser.add_argument("run", help="a run's directory, or its name under --runs-dir")
    parser.add_argument("baseline", help="the run to compare it with, given in the same way")
    parser.add_argument("--out", type=Path, help="folder for the files (default: RUN/report)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs given by name lie")
    options = parser.parse_args(argv)
    try:
        run, baseline = (
            RunFiles.read(find_run(value, options.runs_dir)) for value in (options.run, options.baseline)
        )
        folder = options.out or run.directory / "report"
        check_folder(folder, f"--out {folder}")
    except ValueError as error:
        print(f"sieve compare: {error}", file=sys.stderr)
        return 2
    comparison = write_comparison(run, baseline, [folder])
    print_comparison(run, baseline, comparison, folder, Console())
    return 0
