"""Pictures of an evaluation: the needle's heat map, the loss against position, NSA's health by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sieve.eval.config import NEEDLES
from sieve.eval.runner import Result

_INK = "#333333"
# Okabe and Ito's, told apart in every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot(result: Result, path: Path, title: str) -> bool:
    """Write the PNG of a result that has one; whether it has."""
    draw = {"loss": _loss, "health": _health, "switches": _switches}.get(result.task)
    draw = _heat_map if result.task in NEEDLES else draw
    if draw is None:
        return False
    figure = draw(result)
    figure.suptitle(f"{title}: {result.task}", x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    figure.savefig(path)
    return True


def _heat_map(result: Result) -> Figure:
    rows = result.tables[result.task]
    lengths, depths = (len({row[key] for row in rows}) for key in ("length", "depth"))
    figure = Figure(figsize=(2.2 + 0.75 * lengths, 1.6 + 0.45 * depths), dpi=150, layout="constrained")
    heat_map(figure.subplots(), rows)
    return figure


def heat_map(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy of a needle task, length across and depth down, with its scale beside it. rows: of `sieve eval`, each with
    length, depth and accuracy."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    grid = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        grid[depths.index(row["depth"]), lengths.index(row["length"])] = row["accuracy"]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color="black" if value > 0.5 else "white")
    axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("tokens of the text")
    axis.set_ylabel("depth of the needle")
    axis.figure.colorbar(image, ax=axis, label="accuracy")


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _loss(result: Result) -> Figure:
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, 2, sharey=True), result.tables.items()):
        axis.plot([row["from"] for row in rows], [row["loss"] for row in rows], "o-", color=COLOURS[0], ms=4)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(name.removeprefix("loss by ") + " (tokens)")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss (nats per token)")
    return figure


def _health(result: Result) -> Figure:
    rows = result.tables["health"]
    layer = [row["layer"] for row in rows]
    panels = {
        "gates (mean)": ("gate_cmp", "gate_slc", "gate_win"),
        "saturated gates": ("saturated_cmp", "saturated_slc", "saturated_win"),
        "full attention's weight caught": ("mass_oracle", "mass_recalled", "mass_forced"),
        "selection": ("selection_entropy", "selection_overlap", "forced_share", "never_selected"),
    }
    figure = Figure(figsize=(10, 9), dpi=150, layout="constrained")
    axes = figure.subplots(3, 2).flatten()
    for axis, (name, keys) in zip(axes, panels.items()):
        for key, colour in zip(keys, COLOURS):
            values = [np.nan if row[key] is None else row[key] for row in rows]
            axis.plot(layer, values, "o-", ms=4, color=colour, label=key.split("_", 1)[-1] if "mass" in key else key)
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(name, loc="left", fontsize=9, color=_INK)
        axis.legend(frameon=False, fontsize=8)
    axes[4].plot(layer, [row["selected_distance"] for row in rows], "o-", ms=4, color=COLOURS[0])
    axes[4].set_title("distance back to a selected block (tokens, mean)", loc="left", fontsize=9, color=_INK)
    _distances(axes[5], result.extra["back"])
    for axis in axes[:5]:
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _distances(axis: Any, back: dict[int, list[int]]) -> None:
    """By layer, what share of free choices lies how far back."""
    width = max(map(len, back.values()), default=0)
    if not width:
        axis.text(0.5, 0.5, "no free choice", ha="center", transform=axis.transAxes)
        return
    grid = np.array([[*row, *[0] * (width - len(row))] for row in back.values()], dtype=float)
    grid /= np.maximum(grid.sum(1, keepdims=True), 1)
    axis.imshow(grid, cmap="cividis", aspect="auto", vmin=0)
    axis.set_yticks(range(len(back)), list(back))
    axis.set_xticks(range(width), [str(2**i) for i in range(width)])
    axis.set_xlabel("blocks back (from)")
    axis.set_ylabel("layer")
    axis.set_title("free choices by distance (share of a layer's)", loc="left", fontsize=9, color=_INK)


def _switches(result: Result) -> Figure:
    rows = result.tables["switches"][1:]
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(rows)), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.barh([row["variant"] for row in rows], [row["gap"] for row in rows], color=COLOURS[0])
    axis.axvline(0, color=_INK, lw=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("loss less that of the model as trained (nats per token; left of 0: better)")
    return figure
