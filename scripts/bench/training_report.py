"""What `sieve bench training` prints and writes as markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = ("model", "attention", "compile", "checkpointing", "micro", "length", "step s", "tok/s", "x full", "MFU", "GB")


def _name(row: dict[str, Any]) -> str:
    kind, _, kernel = row["attention"].partition(":")
    if kind != "full":
        return kind
    cudnn = "attention.dense_impl=cudnn" in row.get("settings", ())
    return f"full ({'cudnn' if cudnn else kernel or 'default'})"


def case_line(row: dict[str, Any]) -> str:
    """One case as a line, with its breakdown below."""
    head = f"{row['model']} {_name(row)} {row['length']} compile={row['compile']} checkpointing={row['checkpointing']}"
    if "step_seconds" not in row:
        return f"{head}: {row.get('out_of_memory') or row.get('error')}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    line = (
        f"{head}: {row['step_seconds']:.4f} s ({row['low']:.4f} to {row['high']:.4f}, {row['steps']} steps), "
        f"{row['tokens_per_second']:,.0f} tokens/s{mfu}, peak {row['peak_bytes'] / 1e9:.1f} GB, loss {row['loss']:.4f}, "
        f"warm-up {row['warmup_seconds']:.0f} s"
    )
    return "\n".join([line, *_parts(row)])


def _parts(row: dict[str, Any]) -> list[str]:
    found = row.get("breakdown")
    if found is None:
        return []
    total = found["step_seconds"]
    parts = sorted(found["parts"].items(), key=lambda part: -part[1])
    return ["    " + "; ".join(f"{name} {1e3 * s:.1f} ms ({s / total:.0%})" for name, s in parts if s / total >= 0.002)]


def _full_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Tokens per second of the fastest full-attention case beside `row`."""
    same = ("model", "length", "compile")
    rates = [
        other["tokens_per_second"] for other in rows
        if other["attention"].startswith("full") and "tokens_per_second" in other and all(other[k] == row[k] for k in same)
    ]
    return max(rates, default=None)


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    micro = next((s.partition("=")[2] for s in row.get("settings", ()) if s.startswith("micro_batch=")), "")
    cells = [row["model"], _name(row), row["compile"], row["checkpointing"], micro, f"{row['length']}"]
    if "step_seconds" not in row:
        return [*cells, "out of memory" if "out_of_memory" in row else row["error"][:40], "", "", "", ""]
    full = _full_of(row, rows)
    ratio = "" if full is None else f"{row['tokens_per_second'] / full:.2f}"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return [
        *cells, f"{row['step_seconds']:.4f}", f"{row['tokens_per_second']:.0f}", ratio, mfu, f"{row['peak_bytes'] / 1e9:.1f}",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Every case as a line; `x full`: tokens per second beside the fastest full-attention case of the same length."""
    cells = [list(COLUMNS), *(_cells(row, rows) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def loss_lines(row: dict[str, Any]) -> str:
    """The difference of the fast path's losses from the plain one's, and the yardstick."""
    head = f"{row['model']} {_name(row)} {row['length']}"
    lines = []
    for way in ("fast", "plain, other micro-batches"):
        found = row[way]
        if "largest" in found:
            lines.append(
                f"{head}: {way} beside plain over {len(found['losses'])} steps: largest difference {found['largest']:.5f}, "
                f"mean {found['mean']:.5f}, at the last step {found['last']:.5f} nats"
            )
        else:
            lines.append(f"{head}: {way}: {found.get('error') or found.get('out_of_memory') or 'nothing to compare with'}")
    return "\n".join(lines)


def markdown(run: dict[str, Any], losses: bool) -> str:
    """The table, the breakdowns and where they come from."""
    rows = run["rows"]
    about = [f"`{run['command']}`", "", f"{run['time']}, commit {run['commit']}{' (changed)' if run['changed'] else ''}, "
             f"{run['gpu']}, {', '.join(f'{k} {v}' for k, v in run['packages'].items())}", ""]
    if losses:
        return "\n".join([*about, *(f"- {line}" for row in rows for line in loss_lines(row).splitlines())]) + "\n"
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row, rows)) + " |" for row in rows]
    for row in rows:
        found = row.get("breakdown")
        if found is None:
            continue
        lines += ["", f"{row['model']} {_name(row)} {row['length']}, compile={row['compile']}: milliseconds of a step", "",
                  "| part | ms | share |", "|---|---|---|"]
        lines += [f"| {name} | {1e3 * s:.2f} | {s / found['step_seconds']:.1%} |" for name, s in found["parts"].items()]
    return "\n".join([*about, *lines]) + "\n"
