"""Times of one layer's step: from CUDA graphs that take several caches in turn, and launched anew."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from sieve.kernels.nsa.decode_tiles import DecodeTiles
from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts.bench.cases import Shape
from sieve.scripts.bench.decode_cases import Call, cache_entries, draw, entry_bytes, ours, rival
from sieve.scripts.bench.timing import Timing, reason, time_calls

COLD_BYTES = 256 << 20  # read between two uses of a cache, several times the L2 cache
MOST_CACHES = 48
CHAIN = 8  # steps of one cache in a graph where there are fewer


def in_graph(calls: list[Call]) -> Call:
    """Replays all calls from one CUDA graph."""
    for _ in range(2):  # compiles, and lets libraries choose
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _over(calls: list[Call]) -> Call:
    def every() -> None:
        for call in calls:
            call()

    return every


def time_layer(
    shape: Shape, geometry: Geometry, tokens: int, batch: int, rivals: list[str], rounds: int
) -> dict[str, object]:
    """Milliseconds a step of every call, "graph" and "launched"; bytes read, and the share of choices that hung by rounding."""
    row: dict[str, object] = {"shape": str(shape), "tokens": tokens, "batch": batch}
    each = entry_bytes(shape) * batch
    row["bytes"] = {"nsa": each * cache_entries(tokens, geometry), "full": each * tokens}
    size = each * (tokens + tokens // geometry.kernel_stride + geometry.window_size)
    free = torch.cuda.mem_get_info()[0]
    if 2 * size > free:
        row["skipped"] = f"{size / 1e9:.1f} GB of cache and {free / 1e9:.1f} GB free"
        print(f"{shape}, {tokens} tokens, batch {batch}: skipped, {row['skipped']}", flush=True)
        return row
    count = caches_for(shape, geometry, tokens, batch)
    cases = [draw(shape, [tokens] * batch, geometry, seed=seed) for seed in range(count)]
    chain = cases * max(1, CHAIN // count)
    made: dict[str, list[Call]] = {"nsa": []}
    near: list[float] = []
    for case in cases:
        whole, parts = ours(case)
        made["nsa"].append(whole)
        for name, call in parts.calls.items():
            made.setdefault(f"nsa: {name}", []).append(call)
        near.append(parts.near.float().mean().item())
        tiles = DecodeTiles.of(shape.heads // shape.kv_heads, shape.d_qk, shape.d_v, case.q.dtype, case.q.device)
        made.setdefault("nsa: every choice made anew", []).append(ours(case, replace(tiles, margin=math.inf))[0])
    errors: dict[str, str] = {}
    for name in rivals:
        try:
            calls = [rival(case, name) for case in cases[: -(-COLD_BYTES // row["bytes"]["full"])]]
            difference = (calls[0]().double() - rival(cases[0], "triton")().double()).abs().max().item()
            if not difference < 0.05:
                raise RuntimeError(f"differs from ours by {difference:.2g}")
            made[name] = calls
        except Exception as error:  # libraries raise what they like; the table says which
            errors[name] = reason(error)
    graphs: dict[str, Call] = {}
    for name, calls in made.items():
        try:
            graphs[name] = in_graph(calls * max(1, len(chain) // len(calls)))
        except Exception as error:
            errors[f"{name} in a graph"] = reason(error)
            torch.cuda.synchronize()
    times = {
        "graph": _each(time_calls(graphs, rounds), made, len(chain)),
        "launched": _each(time_calls({name: _over(calls) for name, calls in made.items()}, rounds), made, 0),
    }
    row |= {"caches": count, "near": sum(near) / count, "errors": errors}
    row |= {kind: {name: timing.json() for name, timing in found.items()} for kind, found in times.items()}
    _say(row)
    return row


def caches_for(shape: Shape, geometry: Geometry, tokens: int, batch: int) -> int:
    """How many caches to take in turn, so that none is left in the L2 cache and all fit into memory."""
    each = entry_bytes(shape) * batch
    size = each * (tokens + tokens // geometry.kernel_stride + geometry.window_size)
    read = each * cache_entries(tokens, geometry)
    return max(1, min(MOST_CACHES, -(-COLD_BYTES // read), int(0.5 * torch.cuda.mem_get_info()[0] / size)))


def _each(times: dict[str, Timing], made: dict[str, list[Call]], chain: int) -> dict[str, Timing]:
    """Of one step instead of all in a graph."""
    found = {}
    for name, t in times.items():
        n = len(made[name]) * (max(1, chain // len(made[name])) if chain else 1)
        found[name] = t if t.error else Timing(t.median / n, t.low / n, t.high / n)
    return found


def fastest(row: dict, kind: str) -> tuple[str, float] | None:
    """The quickest full attention of a row: its name and milliseconds."""
    times = {name: t["ms"] for name, t in row.get(kind, {}).items() if not name.startswith("nsa") and "ms" in t}
    return min(times.items(), key=lambda pair: pair[1]) if times else None


def _say(row: dict) -> None:
    best, mine = fastest(row, "graph"), row["graph"].get("nsa", {}).get("ms")
    ratio = f", {best[1] / mine:.2f} times faster than {best[0]}" if best and mine else ""
    shown = f"{mine * 1e3:.1f} us" if mine else "none"
    print(f"{row['shape']}, {row['tokens']} tokens, batch {row['batch']}: nsa {shown}{ratio}", flush=True)
