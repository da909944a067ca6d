"""The comparison as a table and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from sieve.train.comparison import At, Comparison, Pair
from sieve.train.rundir import RunFiles, differences, flatten
from sieve.train.text import duration, short_count

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top; overflow-wrap: anywhere }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.note { border-left: 4px solid #D55E00; background: #fdf1e7; padding: .5rem .8rem; margin: .5rem 0 }
.small { color: #555; font-size: .87rem } code { background: #f3f3f3; padding: .05rem .25rem }
</style></head><body>
<h1>$title</h1>
$notes
<img alt="Loss of both runs against tokens and time, and the gap between them" src="data:image/png;base64,$picture">
<h2>Numbers</h2>
<table class="numbers"><tr><th></th><th>$run</th><th>$baseline</th><th>difference</th></tr>
$numbers
</table>
<p class="small">$method</p>
<h2>Settings that differ</h2>
$settings
<h2>Where they ran</h2>
$environment
</body></html>
""")

METHOD = (
    "Losses are nats per token, smoothed by local fits, straight in log(tokens), over a fifth of the tokens on either side "
    "(nine logged steps at least), so that they do not lag behind a falling curve; validation losses are as measured. A gap "
    "is taken where the shorter run ends, of what both had logged until there; after ± stands its standard error, by the "
    "scatter of the logged losses, which is small at equal tokens, where both have the same batches. "
    "The gap is the run minus the baseline: below zero the run is ahead; its spread is the standard deviation between "
    "single steps of the last fifth. Tokens per second are medians of the logged steps without their first tenth. "
    "Seconds are those of training steps, compilation included, without evaluations and checkpoints. FLOPs are the "
    "model's own by closed formula, without recomputation. Memory is what torch allocated on a GPU, on the CPU the "
    "whole process's resident set."
)


class Line(NamedTuple):
    """A line of the table, formatted."""

    label: str
    run: str
    baseline: str
    difference: str


def table(comparison: Comparison) -> list[Line]:
    """The comparison line by line; what neither run logged is left out."""
    c = comparison
    lines = [
        _loss("loss at equal tokens", c.at_equal_tokens, short_count),
        Line("  spread of the gap", "", "", f"± {c.gap_std:.4f} nats") if c.gap_std is not None else None,
        _loss("loss at equal FLOPs", c.at_equal_flops, lambda x: f"{x:.3g}"),
        _loss("loss at equal time", c.at_equal_seconds, duration),
    ]
    if c.evaluation.run is not None and c.evaluation.baseline is not None and c.evaluation_tokens is not None:
        gap = c.evaluation.run - c.evaluation.baseline
        label = f"validation loss ({short_count(c.evaluation_tokens)})"
        lines.append(Line(label, f"{c.evaluation.run:.4f}", f"{c.evaluation.baseline:.4f}", f"{gap:+.4f} nats"))
    lines += [
        _number("final loss, smoothed", c.final_loss, lambda x: f"{x:.4f}", ratio=False),
        _number("tokens trained on", c.tokens, short_count, ratio=False),
        _number("tokens per second", c.tokens_per_second, short_count),
        _number("training time", c.seconds, duration),
        _number("MFU", c.mfu, lambda x: f"{x:.1%}"),
        _number("FLOPs per token", c.flops_per_token, short_count),
        _number("peak memory", c.peak_memory_bytes, lambda x: f"{x / 2**30:.2f} GiB"),
        _number("parameters", c.parameters, short_count),
        _number("active parameters", c.active_parameters, short_count),
    ]
    return [line for line in lines if line is not None]


def _loss(label: str, at: At | None, show: Callable[[float], str]) -> Line | None:
    if at is None:
        return None
    error = "" if at.gap_error is None else f" ± {at.gap_error:.4f}"
    return Line(f"{label} ({show(at.amount)})", f"{at.run:.4f}", f"{at.baseline:.4f}", f"{at.gap:+.4f}{error} nats")


def _number(label: str, pair: Pair, show: Callable[[float], str], *, ratio: bool = True) -> Line | None:
    if pair.run is None and pair.baseline is None:
        return None
    texts = [show(value) if value is not None else "not logged" for value in (pair.run, pair.baseline)]
    return Line(label, *texts, f"{pair.ratio:.2f}×" if ratio and pair.ratio is not None else "")


def write_html(run: RunFiles, baseline: RunFiles, comparison: Comparison, picture: Path, path: Path) -> None:
    """Write the report with `picture` (PNG) inside it."""
    title = f"{run.name} against {baseline.name}"
    settings = differences(run.config, baseline.config)
    ours, theirs = flatten(run.environment), flatten(baseline.environment)
    facts = {key: (ours.get(key), theirs.get(key)) for key in ours | theirs}
    path.write_text(_PAGE.substitute(
        title=escape(title), run=escape(run.name), baseline=escape(baseline.name), method=escape(METHOD),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in comparison.notes),
        numbers="\n".join(_row(*line) for line in table(comparison)),
        settings=_pairs(settings, run, baseline) or "<p>None, or no config.yaml.</p>",
        environment=_pairs(facts, run, baseline) or "<p>Unknown: no environment.json.</p>",
    ), encoding="utf-8")


def _pairs(values: dict[str, tuple[object, object]], run: RunFiles, baseline: RunFiles) -> str:
    """A table of both runs' values, or "" for none; a value that both share stands once. Long text is folded away."""
    if not values:
        return ""
    rows = [f"<tr><th></th><th>{escape(run.name)}</th><th>{escape(baseline.name)}</th></tr>"]
    for key, pair in values.items():
        cells = [_cell(key, value) for value in pair]
        same = cells[0] == cells[1]
        rows.append(
            f"<tr><td>{escape(key)}</td>"
            + (f'<td colspan="2">{cells[0]}</td>' if same else f"<td>{cells[0]}</td><td>{cells[1]}</td>") + "</tr>"
        )
    return "<table>" + "\n".join(rows) + "</table>"


def _cell(key: str, value: object) -> str:
    if key == "command" and isinstance(value, list):
        return f"<code>{escape(shlex.join(map(str, value)))}</code>"
    if isinstance(value, str) and "\n" in value:
        return f"<details><summary>{len(value.splitlines())} lines</summary><pre>{escape(value)}</pre></details>"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
