"""The picture of a comparison: both loss curves against tokens and against time, and the gap between them below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy import ndarray

from sieve.train.comparison import Comparison, Curve
from sieve.train.rundir import RunFiles
from sieve.train.text import duration, short_count

# Okabe and Ito's blue and vermilion keep apart in every common colour blindness and in grey.
_RUN, _BASELINE, _INK = "#0072B2", "#D55E00", "#333333"
_POINTS = 400


def plot_comparison(run: RunFiles, baseline: RunFiles, comparison: Comparison, path: Path) -> None:
    """Write the PNG: left against tokens, right against training seconds (left out when no run logged its step time).

    Faint lines are the logged losses, strong ones smoothed, circles validation losses. Below, run minus
    baseline in nats: under zero the run is ahead.
    """
    ours, theirs = Curve.of(run), Curve.of(baseline)
    timed = ours.seconds is not None and theirs.seconds is not None
    figure = Figure(figsize=(11.5 if timed else 6.5, 6.2), dpi=150, layout="constrained")
    axes = figure.subplots(2, 2 if timed else 1, sharex="col", height_ratios=(2.4, 1), squeeze=False)
    for axis in axes[0, 1:]:
        axis.sharey(axes[0, 0])
    _column(axes[:, 0], (ours.tokens, theirs.tokens), ours, theirs, (run, baseline))
    axes[1, 0].set_xlabel("training tokens")
    axes[1, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if timed:
        _column(axes[:, 1], (ours.seconds, theirs.seconds), ours, theirs, (run, baseline))
        axes[1, 1].set_xlabel("training time (evaluation and checkpoints left out)")
        axes[1, 1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel("gap (nats)")
    axes[0, 0].legend(frameon=False, loc="best")
    axes[0, 0].set_title("at equal tokens", loc="left", fontsize=10, color=_INK)
    title = f"{run.name} − {baseline.name} (below 0: {run.name} is ahead)"
    for axis in axes[1]:
        axis.set_title(title, loc="left", fontsize=9, color=_INK)
    if timed:
        axes[0, 1].set_title("at equal time", loc="left", fontsize=10, color=_INK)
    end = comparison.at_equal_tokens
    doubts = {True: "", False: " (DIFFERENT tokens)", None: " (not shown to be the same tokens)"}
    headline = f"{run.name} against {baseline.name}: {end.gap:+.4f} nats at {short_count(end.amount)} tokens"
    figure.suptitle(headline + doubts[comparison.same_tokens], fontsize=12, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path)


def _column(
    pair: ndarray, x: tuple[ndarray, ndarray], ours: Curve, theirs: Curve, runs: tuple[RunFiles, RunFiles]
) -> None:
    """Losses above, gap below, both against `x` (tokens or seconds of the run and of the baseline)."""
    top, bottom = pair
    smoothed = []
    for spent, curve, run, colour, dash in zip(x, (ours, theirs), runs, (_RUN, _BASELINE), ("-", (0, (5, 1.5)))):
        at = np.linspace(spent[0], spent[-1], min(_POINTS, 4 * len(spent)))
        line = curve.smoothed(at, spent)
        smoothed.append(line)
        top.plot(spent, curve.loss, color=colour, linewidth=0.7, alpha=0.3)
        top.plot(at, line, color=colour, linewidth=1.8, linestyle=dash, label=run.name)
        held = [(row["tokens"], row["eval/loss"]) for row in run.rows if "eval/loss" in row and "tokens" in row]
        if held:
            tokens, losses = np.array(held).T
            top.plot(
                np.interp(tokens, curve.tokens, spent), losses, "o", markersize=5, markerfacecolor="white",
                markeredgecolor=colour, label=f"{run.name}, validation",
            )
    late = [row["eval/loss"] for run in runs for row in run.rows[len(run.rows) // 12 :] if "eval/loss" in row]
    _limits(top, (ours.loss, theirs.loss), [*smoothed, np.array(late)])
    common = np.linspace(max(s[0] for s in x), min(s[-1] for s in x), _POINTS)
    if common[-1] >= common[0]:
        gap = ours.smoothed(common, x[0], common[-1]) - theirs.smoothed(common, x[1], common[-1])
        if np.array_equal(x[0], x[1]):  # the same steps: their single gaps are without the batches' noise
            bottom.plot(x[0], ours.loss - theirs.loss, color=_INK, linewidth=0.6, alpha=0.35)
        bottom.plot(common, gap, color=_INK, linewidth=1.6)
        bottom.fill_between(common, gap, 0, where=gap > 0, color=_BASELINE, alpha=0.18, linewidth=0)
        bottom.fill_between(common, gap, 0, where=gap < 0, color=_RUN, alpha=0.18, linewidth=0)
        reach = 1.35 * np.nanmax(np.abs(gap[len(gap) // 4:]))  # the first steps' gap would hide the rest
        if reach > 0:
            low, high = bottom.get_ylim()
            bottom.set_ylim(max(-reach, low), min(reach, high))
    bottom.axhline(0, color=_INK, linewidth=0.8)
    for axis in (top, bottom):
        axis.grid(alpha=0.2, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)


def _limits(axis: Axes, losses: tuple[ndarray, ndarray], smoothed: list[ndarray]) -> None:
    """Let the fall from the first loss leave the picture at the top: what matters is the rest."""
    rest = np.concatenate([line[len(line) // 12:] for line in smoothed])
    low = min(float(np.nanmin(line)) for line in losses)
    high = float(np.nanmax(rest))
    if np.isfinite(low) and np.isfinite(high) and high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
