"""Tables of the decode benchmark, from what stands in its JSON."""

from __future__ import annotations

from sieve.scripts.bench.decode_timing import fastest


def print_layers(run: dict) -> None:
    """A line a shape, length and batch, then the times of every call."""
    rows = [row for row in run["layers"] if "graph" in row]
    if not rows:
        return
    bandwidth = run["ceilings"]["bandwidth"]
    print(f"\none layer's step, microseconds in a CUDA graph (launched anew); floor: bytes at {bandwidth / 1e12:.2f} TB/s")
    titles = {"shape": 16, "tokens": 8, "batch": 6, "nsa": 18, "floor": 9, "full, fastest": 30, "its floor": 10}
    print("".join(f"{title:>{width}}" for title, width in (titles | {"ratio": 7, "bytes": 7}).items()))
    for row in rows:
        best, mine = fastest(row, "graph"), row["graph"].get("nsa", {}).get("ms")
        anew = row["launched"].get("nsa", {}).get("ms")
        floors = {name: size / bandwidth * 1e3 for name, size in row["bytes"].items()}
        cells = [f"{mine * 1e3:.1f}" if mine else "none", f"({anew * 1e3:.0f})" if anew else ""]
        line = f"{row['shape']:>16}{row['tokens']:>8}{row['batch']:>6}{' '.join(cells):>18}"
        line += f"{floors['nsa'] / mine:>9.0%}" if mine else f"{'':>9}"
        if best:
            line += f"{f'{best[0]} {best[1] * 1e3:.1f}':>30}{floors['full'] / best[1]:>10.0%}"
        if best and mine:
            line += f"{best[1] / mine:>7.2f}{row['bytes']['full'] / row['bytes']['nsa']:>7.1f}"
        print(line)
    print("\nby launch and by rival, microseconds in a CUDA graph")
    for row in rows:
        timed = {name: t["ms"] * 1e3 for name, t in row["graph"].items() if "ms" in t and name != "nsa"}
        parts = ", ".join(f"{name.removeprefix('nsa: ')} {us:.1f}" for name, us in timed.items())
        print(f"  {row['shape']} {row['tokens']} x {row['batch']}: {parts}")
    for text in sorted({f"  {name}: {error}" for row in rows for name, error in row["errors"].items()}):
        print(text)


def print_models(run: dict) -> None:
    """Tokens a second of whole models, and the cache's bytes."""
    rows = [row for row in run["models"] if "tokens_per_second" in row]
    if not rows:
        return
    print("\nwhole model, tokens/s of all sequences")
    print(f"{'model':>10}{'attention':>10}{'tokens':>8}{'batch':>6}{'launches':>10}{'graph':>10}{'cache GB':>10}{'formula':>9}")
    for row in rows:
        rates = [f"{row['tokens_per_second'].get(kind, float('nan')):.0f}" for kind in ("launches", "graph")]
        print(
            f"{row['model']:>10}{row['attention']:>10}{row['tokens']:>8}{row['batch']:>6}{rates[0]:>10}{rates[1]:>10}"
            f"{row['cache_bytes'] / 1e9:>10.3f}{row['cache_bytes'] / row['formula_bytes']:>9.3f}"
        )
    for reason in sorted({row["no_graph"] for row in rows if row["no_graph"]}):
        print(f"  no graph: {reason}")
