"""Two runs side by side, in numbers: loss at equal tokens, equal FLOPs and equal seconds, speed, memory, size."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy import ndarray

from sieve.train.baseline import steady
from sieve.train.rundir import RunFiles, differences
from sieve.train.schema import shown

# Settings that may differ between twins without a word: what is compared, and what does not touch the weights.
_INCIDENTAL = ("attention.", "name", "runs_dir", "baseline", "resume", "logger.", "log.", "checkpoint.", "eval.")


LISTED = 10  # settings that differ: of runs with more, none is the reason by itself
FEW = 20  # logged losses; of a curve like 2 + 6 / n^0.3 the smoothed end is off by 0.002 with as many, and by 0.02 with ten


@dataclass(frozen=True)
class Curve:
    """Training loss of a run (nats), a point a logged step: tokens seen, training seconds and FLOPs spent until then.

    seconds counts training steps, compilation included, without evaluations and checkpoints. None where not logged.
    """

    tokens: ndarray
    loss: ndarray
    seconds: ndarray | None
    flops: ndarray | None

    @classmethod
    def of(cls, run: RunFiles) -> Curve:
        rows = [row for row in run.rows if "train/loss" in row and "tokens" in row]
        tokens = np.array([row["tokens"] for row in rows], dtype=float)
        steps = np.array([row["step"] for row in rows], dtype=float)
        seconds = None
        if all("perf/step_seconds" in row for row in rows):
            seconds = np.cumsum(np.array([row["perf/step_seconds"] for row in rows]) * np.diff(steps, prepend=0.0))
        parts = run.environment.get("flops_per_token")
        flops = tokens * sum(parts.values()) if parts else None
        return cls(tokens, np.array([row["train/loss"] for row in rows], dtype=float), seconds, flops)

    def until(self, end: float, spent: ndarray) -> Curve:
        """Without what comes after `end` (of `spent`: tokens, seconds or flops of this curve), the first point excepted.

        A gap is between curves that end alike: a fit at the end, with points on one side of it alone, is another than that of
        the same curve where it goes on.
        """
        count = max(1, int(np.searchsorted(spent, end * (1 + 1e-9), side="right")))
        return Curve(*(None if x is None else x[:count] for x in (self.tokens, self.loss, self.seconds, self.flops)))

    def smoothed(self, at: ndarray, spent: ndarray, end: float | None = None) -> ndarray:
        """The loss where `spent` (tokens, seconds or flops of this curve) is `at`, of the points until `end`. Smoothed over
        tokens in any case, so that one point of a run has one loss, whatever it is looked up by."""
        part = self if end is None else self.until(end, spent)
        return fit(part.tokens, part.loss, np.interp(at, spent, self.tokens))[0]


def fit(x: ndarray, y: ndarray, at: ndarray) -> tuple[ndarray, ndarray]:
    """y at `at`, x and at above 0, and its standard error: a straight line in log x fitted to the points within a fifth of `at`
    around it (the nine nearest at least).

    Local regression (Cleveland 1979, tricube weights): unlike a running mean it does not lag behind a falling loss, at
    the end neither; and it is linear in y, so that the difference of two fits over the same x is the fit of the
    differences. In log x because a loss falls with the logarithm of what was spent: nine points may be half of a run.
    The error is that of the points' scatter around the line, NaN where two or fewer points leave none.
    """
    finite = np.isfinite(y)
    x, y = np.log(x[finite]), y[finite]
    found, errors = np.full((2, len(at)), np.nan)
    for index, point in enumerate(np.log(at)) if len(x) else ():
        distance = np.abs(x - point)
        near = min(len(x), max(9, int(np.count_nonzero(distance <= 0.2))))
        chosen = np.argpartition(distance, near - 1)[:near]
        reach = distance[chosen].max() * 1.0001 or 1.0  # the farthest keeps a little weight, so that two points suffice
        weight = (1 - (distance[chosen] / reach) ** 3) ** 3
        weight /= weight.sum()
        dx, values = x[chosen] - point, y[chosen]
        mean_x, mean_y = weight @ dx, weight @ values
        variance = weight @ (dx - mean_x) ** 2
        slope = weight @ ((dx - mean_x) * (values - mean_y)) / variance if variance > 0 else 0.0
        found[index] = mean_y - slope * mean_x
        if near > 2 and variance > 0:
            scatter = weight @ (values - mean_y - slope * (dx - mean_x)) ** 2 * near / (near - 2)
            share = weight * (1 - mean_x * (dx - mean_x) / variance)  # of each point in what was found
            errors[index] = np.sqrt(scatter * (share @ share))
    return found, errors


@dataclass(frozen=True)
class At:
    """Smoothed training losses where both have spent `amount` (tokens, FLOPs or seconds); gap is run - baseline.

    gap_error: its standard error by the scatter of the logged losses, which of the same steps have the same batches and so
    much of it in common; None where too few were logged.
    """

    amount: float
    run: float
    baseline: float
    gap: float
    gap_error: float | None


@dataclass(frozen=True)
class Pair:
    """One number of each run; None where a run did not log it."""

    run: float | None
    baseline: float | None

    @property
    def ratio(self) -> float | None:
        return self.run / self.baseline if self.run is not None and self.baseline else None


@dataclass(frozen=True)
class Comparison:
    """All numbers of the report. same_tokens: None when no step was logged at the same token count by both runs.

    gap_std: standard deviation of the gap between single steps over the last fifth of the matched ones.
    evaluation: validation losses at the last token count evaluated in both runs.
    """

    same_tokens: bool | None
    matched_steps: int
    first_difference_tokens: int | None
    tokens: Pair
    final_loss: Pair
    evaluation: Pair
    evaluation_tokens: int | None
    at_equal_tokens: At
    gap_std: float | None
    at_equal_flops: At | None
    at_equal_seconds: At | None
    tokens_per_second: Pair
    seconds: Pair
    flops_per_token: Pair
    mfu: Pair
    peak_memory_bytes: Pair
    parameters: Pair
    active_parameters: Pair
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def compare(run: RunFiles, baseline: RunFiles) -> Comparison:
    """Every number of the comparison, and notes on what makes it less than one between twins."""
    ours, theirs = Curve.of(run), Curve.of(baseline)
    by_tokens = {int(row["tokens"]): row for row in baseline.rows if "tokens" in row}
    matched = [(row, by_tokens[int(row["tokens"])]) for row in run.rows if row.get("tokens") in by_tokens]
    hashed = [(a, b) for a, b in matched if "data/tokens_hash" in a and "data/tokens_hash" in b]
    different = [int(a["tokens"]) for a, b in hashed if a["data/tokens_hash"] != b["data/tokens_hash"]]
    evaluated = [(a, b) for a, b in matched if "eval/loss" in a and "eval/loss" in b]
    gaps = [a["train/loss"] - b["train/loss"] for a, b in matched if "train/loss" in a and "train/loss" in b]
    tail = gaps[-max(2, len(gaps) // 5):]
    parameters = [r.environment.get("parameters") or {} for r in (run, baseline)]
    return Comparison(
        same_tokens=not different if hashed else None,
        matched_steps=len(gaps),
        first_difference_tokens=different[0] if different else None,
        tokens=Pair(float(ours.tokens[-1]), float(theirs.tokens[-1])),
        final_loss=Pair(*(float(c.smoothed(c.tokens[-1:], c.tokens)[0]) for c in (ours, theirs))),
        evaluation=Pair(*(row["eval/loss"] for row in evaluated[-1])) if evaluated else Pair(None, None),
        evaluation_tokens=int(evaluated[-1][0]["tokens"]) if evaluated else None,
        at_equal_tokens=_at(ours, theirs, "tokens"),
        gap_std=float(np.std(tail)) if len(tail) > 1 else None,
        at_equal_flops=_at(ours, theirs, "flops"),
        at_equal_seconds=_at(ours, theirs, "seconds"),
        tokens_per_second=Pair(*(steady(r.rows, "perf/tokens_per_second") for r in (run, baseline))),
        seconds=Pair(*(None if c.seconds is None else float(c.seconds[-1]) for c in (ours, theirs))),
        flops_per_token=Pair(*(None if c.flops is None else float(c.flops[-1] / c.tokens[-1]) for c in (ours, theirs))),
        mfu=Pair(*(steady(r.rows, "perf/mfu") for r in (run, baseline))),
        peak_memory_bytes=Pair(*(_most(r, "perf/peak_memory_bytes") for r in (run, baseline))),
        parameters=Pair(*(p.get("total") for p in parameters)),
        active_parameters=Pair(*(p.get("active") for p in parameters)),
        notes=tuple(_notes(run, baseline, ours, theirs, len(gaps), hashed, different)),
    )


def _at(ours: Curve, theirs: Curve, unit: str) -> At | None:
    """Both losses where the run that spent less of `unit` ends; None when either did not log it."""
    x, other = getattr(ours, unit), getattr(theirs, unit)
    if x is None or other is None:
        return None
    amount = min(x[-1], other[-1])
    parts = [curve.until(amount, spent) for curve, spent in ((ours, x), (theirs, other))]
    places = [np.interp([amount], spent, curve.tokens) for curve, spent in ((ours, x), (theirs, other))]
    (run, baseline), errors = zip(*(fit(part.tokens, part.loss, place) for part, place in zip(parts, places)))
    error = float(np.hypot(*errors)[0])
    if np.array_equal(parts[0].tokens, parts[1].tokens) and places[0] == places[1]:
        error = float(fit(parts[0].tokens, parts[0].loss - parts[1].loss, places[0])[1][0])
    gap = float(run[0] - baseline[0])
    return At(float(amount), float(run[0]), float(baseline[0]), gap, error if np.isfinite(error) else None)


def _most(run: RunFiles, key: str) -> float | None:
    return max((row[key] for row in run.rows if key in row), default=None)


def _notes(
    run: RunFiles, baseline: RunFiles, ours: Curve, theirs: Curve, matched: int, hashed: list, different: list[int]
) -> list[str]:
    """Sentences a reader must know before believing the numbers; empty between true twins of equal length."""
    notes = []
    if different:
        notes.append(
            f"The runs read DIFFERENT tokens (data/tokens_hash differs from {different[0]:,} tokens on): "
            "the loss gaps compare different data."
        )
    elif not hashed:
        notes.append("No common step has data/tokens_hash in both runs: nothing shows that they read the same tokens.")
    few = [f"{run.name} {len(curve.loss)}" for run, curve in ((run, ours), (baseline, theirs)) if len(curve.loss) < FEW]
    if few:
        notes.append(
            f"Fewer than {FEW} training losses were logged ({', '.join(few)}): smoothed ones may be off by some hundredths of "
            "a nat; log.every says how often they are."
        )
    if not matched:
        notes.append("No step was logged at the same token count by both runs; the gap is between the smoothed curves.")
    if ours.tokens[-1] != theirs.tokens[-1]:
        notes.append(
            f"The runs differ in length: {run.name} has {ours.tokens[-1]:,.0f} tokens, {baseline.name} "
            f"{theirs.tokens[-1]:,.0f}; gaps are taken where the shorter one ends, and a learning-rate schedule that "
            "has not come to its end there counts against the longer one."
        )
    for each in (run, baseline):
        for unit, key in (("steps", "step"), ("tokens", "tokens")):
            wanted, done = each.config.get(unit), each.rows[-1].get(key, 0)
            if isinstance(wanted, int) and done < wanted:
                notes.append(f"{each.name} is not finished: {done:,} of {wanted:,} {unit}.")
    others = {k: v for k, v in differences(run.config, baseline.config).items() if not k.startswith(_INCIDENTAL)}
    if run.config and baseline.config and others:
        listed = ", ".join(f"{key} ({shown(a)} against {shown(b)})" for key, (a, b) in list(others.items())[:LISTED])
        if len(others) > LISTED:
            listed += f" and {len(others) - LISTED} more; config.yaml has them"
        notes.append(f"Other settings than the attention differ: {listed}.")
    for key in ("gpu", "device", "world_size", "cpu_count"):
        pair = [r.environment.get(key) for r in (run, baseline)]
        if pair[0] != pair[1]:
            notes.append(f"The hardware differs ({key}: {pair[0]} against {pair[1]}): throughput is not comparable.")
    return notes
