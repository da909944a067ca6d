"""What a measurement leaves behind: a printed table, raw JSON with where it comes from, and a plot."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import torch

from sieve.data.disk import writing
from sieve.scripts.bench.timing import Ceilings, Timing

PACKAGES = ("torch", "triton", "flash-attn-4", "fla-core", "nvidia-cudnn-cu13", "liger-kernel", "deepspeed")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""


def origin(argv: list[str], program: str = "sieve bench") -> dict[str, object]:
    """Command, commit, versions and hardware of this run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join([program, *argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {platform.machine()}",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": versions,
    }


def write_json(path: Path, run: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        path.write_text(json.dumps(run, indent=1) + "\n")


def _both(forward: dict[str, Timing], backward: dict[str, Timing], name: str, rival: str | None) -> str:
    """How many times faster than the rival forward and backward are together."""
    if rival is None or name not in forward or name not in backward:
        return "-"
    theirs, ours = (forward[n].median + backward[n].median for n in (rival, name))
    return f"{theirs / ours:.2f}" if ours == ours and theirs == theirs else "-"


def print_table(
    title: str, names: list[str], forward: dict[str, Timing], backward: dict[str, Timing],
    least: tuple[dict[str, float], dict[str, float]], rival: str | None, ceilings: Ceilings,
    peaks: dict[str, tuple[int, int]],
) -> None:
    """One line a call: milliseconds and half their range, times the rival's speed (forward, backward, both), share of
    the floor, and peak memory beyond what stood before."""
    print(f"\n{title}", flush=True)
    print(f"{'':26}{'forward ms':>20}{'backward ms':>20}{'x rival':>20}{'of floor':>14}{'peak GB':>14}")
    for name in names:
        cells = []
        for timing in (forward.get(name), backward.get(name)):
            if timing is None:
                cells.append("")
            elif timing.error:
                cells.append("none")
            else:
                cells.append(f"{timing.median:.3f} ±{(timing.high - timing.low) / 2:.3f}")
        shares, ratios = [], []
        for timings, flops in ((forward, least[0]), (backward, least[1])):
            ours = timings.get(name)
            kind = "operator" if name.startswith("ours") else "dense" if name in ("fa4", "cudnn", "fa2") else name
            works = ours is not None and not ours.error
            shares.append(f"{flops[kind] / ceilings.flops * 1e3 / ours.median:.0%}" if works and kind in flops else "-")
            best = timings.get(rival) if rival else None
            ratios.append(f"{best.median / ours.median:.2f}" if works and best and not best.error else "-")
        peak = "/".join(f"{size / 1e9:.2f}" for size in peaks[name]) if name in peaks else ""
        ratios.append(_both(forward, backward, name, rival))
        line = f"{name:26}{cells[0]:>20}{cells[1]:>20}{' / '.join(ratios):>20}{' / '.join(shares):>14}{peak:>14}"
        print(line, flush=True)
    for side, timings in (("forward", forward), ("backward", backward)):
        for name, timing in timings.items():
            if timing.error:
                print(f"  {name} {side}: {timing.error}", file=sys.stderr)


def crossovers(rows: list[dict[str, object]]) -> dict[str, dict[str, float | str]]:
    """By shape and our calls: the row length from which forward and backward together are no slower than the rival's.

    Between two measured lengths on a straight line in the logarithms; "below N" or "above N" where none was crossed.
    """
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name in row["whole"]:
            sums = []
            for call in (name, row["rival"]):
                times = [row[side].get(call, {}).get("ms") for side in ("forward", "backward")]
                sums.append(None if None in times else sum(times))
            if name.startswith("ours") and None not in sums:
                gain = math.log(sums[1] / sums[0])
                points.setdefault(row["shape"], {}).setdefault(name, []).append((row["tokens"], gain))
    return {shape: {name: _zero(sorted(at)) for name, at in calls.items()} for shape, calls in points.items()}


def _zero(points: list[tuple[int, float]]) -> float | str:
    """Where the gain stops being negative for good."""
    behind = [i for i, (_, gain) in enumerate(points) if gain < 0]
    if not behind:
        return f"below {points[0][0]}"
    if behind[-1] == len(points) - 1:
        return f"above {points[-1][0]}"
    (a, low), (b, high) = points[behind[-1]], points[behind[-1] + 1]
    return math.exp(math.log(a) + (math.log(b) - math.log(a)) * low / (low - high))


def print_crossovers(found: dict[str, dict[str, float | str]]) -> None:
    for shape, calls in found.items():
        for name, length in calls.items():
            shown = length if isinstance(length, str) else f"{length:.0f}"
            print(f"{shape}, {name}: as fast as the rival, forward + backward, from {shown} tokens")


def plot(path: Path, rows: list[dict[str, object]], note: str) -> None:
    """Times against row length, one panel a shape and direction; `rows` as in the JSON file's "rows"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(2, len(shapes), figsize=(4.2 * len(shapes) + 1, 7), squeeze=False, sharex=True)
    for column, shape in enumerate(shapes):
        for axis, side in zip(axes[:, column], ("forward", "backward")):
            lines: dict[str, list[tuple[int, float]]] = {}
            for row in rows:
                for name, timing in row[side].items():
                    if row["shape"] == shape and "ms" in timing and name in row["whole"]:
                        lines.setdefault(name, []).append((row["tokens"], timing["ms"]))
            for name, points in lines.items():
                axis.plot(*zip(*sorted(points)), marker="o", markersize=3, label=name)
            axis.set(xscale="log", yscale="log", title=f"{shape} {side}", ylabel="ms")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("tokens in the row")
    figure.suptitle(textwrap.fill(note, 80 * len(shapes)), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
