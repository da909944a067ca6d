"""Times of one layer's step by how its launches are cut: each launch by its own options, then the best of them together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from sieve.kernels.common.launch import multiprocessors
from sieve.kernels.common.split_keys import Tile
from sieve.kernels.nsa.decode_tiles import SELECT_WARPS, DecodeTiles, share_of
from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts.bench.cases import Shape
from sieve.scripts.bench.decode_cases import DecodeCase, draw, ours
from sieve.scripts.bench.decode_timing import caches_for, in_graph
from sieve.scripts.bench.timing import reason, time_calls

TILES = [(keys, warps, stages) for keys in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)]
PROGRAMS = (1, 2, 3, 4, 6)  # a multiprocessor
SHARES = (32, 64, 128, 256)
COMPILERS = 12


def says(tile: Tile, programs: int, device: torch.device) -> str:
    return (
        f"keys {tile.keys}, warps {tile.num_warps}, stages {tile.num_stages}, "
        f"programs {programs / multiprocessors(device):g} a multiprocessor"
    )


def _cut(name: str, which: str, count: str, base: DecodeTiles, device: torch.device) -> Iterator[tuple[str, DecodeTiles]]:
    """Options of the launch whose tile is field `which` and whose number of programs is `count`: name, tiles."""
    own = getattr(base, which)
    tried = [(own, n) for n in PROGRAMS] + [(Tile(own.rows, *numbers), n) for numbers in TILES for n in (2, 3, 4)]
    for tile, n in dict.fromkeys(tried):
        if which == "select" and tile.num_warps != SELECT_WARPS:
            continue
        programs = n * multiprocessors(device)
        yield f"{name}: {says(tile, programs, device)}", replace(base, **{which: tile, count: programs})


def _timed(
    cases: list[DecodeCase], options: dict[str, DecodeTiles], launch: str, rounds: int, found: list[dict]
) -> tuple[str, DecodeTiles]:
    """The option that is quickest in `launch` (nsa: in all), timed from CUDA graphs; every option's time goes to `found`."""
    with ThreadPoolExecutor(COMPILERS) as pool:  # most of a first call is compilation; errors show again below
        for future in [pool.submit(ours, cases[0], tiles) for tiles in options.values()]:
            future.exception()
    torch.cuda.synchronize()
    graphs, alive = {}, []  # a graph of one launch writes to memory that its step's closures own
    for name, tiles in options.items():
        try:
            alive.append([ours(case, tiles) for case in cases])
            graphs[name] = in_graph([whole if launch == "nsa" else parts.calls[launch] for whole, parts in alive[-1]])
        except Exception as error:  # a tile that does not compile or fit
            found.append({"options": name, "launch": launch, "error": reason(error)})
    times = {name: t.median / len(cases) * 1e3 for name, t in time_calls(graphs, rounds, slice_ms=15.0).items()}
    for name, us in sorted(times.items(), key=lambda item: item[1]):
        found.append({"options": name, "launch": launch, "us": us})
    best = min(times, key=times.get)
    return best, options[best]


def sweep(shape: Shape, geometry: Geometry, tokens: int, batch: int, rounds: int) -> dict[str, object]:
    """Microseconds of each launch by its options, one launch after the other, the best of each kept for the next."""
    start, device = time.perf_counter(), torch.device("cuda", torch.cuda.current_device())
    cases = [
        draw(shape, [tokens] * batch, geometry, seed=seed) for seed in range(caches_for(shape, geometry, tokens, batch))
    ]
    base = DecodeTiles.of(shape.heads // shape.kv_heads, shape.d_qk, shape.d_v, torch.bfloat16, device)
    found: list[dict] = []
    first, tiles = _timed(
        cases, dict(_cut("first", "first", "programs", base, device)), "compression, window", rounds, found
    )
    select, tiles = _timed(
        cases, dict(_cut("select", "select", "select_programs", tiles, device)), "top-n, selection", rounds, found
    )
    blocks, kept = -(-tokens // geometry.block_size), 1 << (geometry.topk - 1).bit_length()
    shares = {f"share {n}": replace(tiles, share=n) for n in dict.fromkeys((share_of(blocks, kept), *SHARES))}
    share, tiles = _timed(cases, shares, "nsa", rounds, found)
    last = {"as it is": base, "best of each": tiles}
    last |= {f"{name}, launches not overlapped": replace(cut, overlap=False) for name, cut in last.items()}
    _timed(cases, last, "nsa", rounds, found)
    row = {"shape": str(shape), "tokens": tokens, "batch": batch, "seconds": time.perf_counter() - start}
    return row | {"best": [first, select, share], "sweep": found}


def print_sweep(rows: list[dict], most: int = 6) -> None:
    """Of each shape, length and batch the best options of every launch, then what they come to together."""
    for row in rows:
        print(f"\n{row['shape']}, {row['tokens']} tokens, batch {row['batch']}, microseconds, {row['seconds']:.0f} s")
        for launch in dict.fromkeys(entry["launch"] for entry in row["sweep"]):
            entries = [entry for entry in row["sweep"] if entry["launch"] == launch]
            print(f"  {launch}")
            timed = [entry for entry in entries if "us" in entry]
            for entry in timed if launch == "nsa" else timed[:most]:
                print(f"    {entry['us']:8.1f}  {entry['options']}")
        failed = [entry for entry in row["sweep"] if "error" in entry]
        for text in sorted({entry["error"] for entry in failed}):
            print(f"    {sum(entry['error'] == text for entry in failed)} options: {text}")
        print("  best: " + "; ".join(row["best"]))
