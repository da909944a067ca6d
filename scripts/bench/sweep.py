"""Times a branch's kernels over their tile sizes, best first: how the tables of the launchers are filled."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from sieve.scripts.bench.cases import Case
from sieve.scripts.bench.timing import Timing, time_calls

Call = Callable[[], object]
LAUNCH = ("num_warps", "num_stages", "max_registers")  # fields of every Tile; the other two are its sides
SWEPT = ("compression", "scores", "selection", "window")


def _launches(case: Case, branch: str) -> dict[str, tuple[Callable[[object], object], object]]:
    """The branch's launches: name -> (call of a tile, the table's tile)."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x.detach() for x in case.inputs)
    packing, geometry, do, w, s = case.packing, case.geometry, case.do, case.geometry.window_size, case.scale
    shape, dims = case.shape, (case.shape.d_qk, case.shape.d_v)
    group = shape.heads // shape.kv_heads
    dq = torch.zeros_like(q)
    if branch == "window":
        from sieve.kernels.nsa import window_bwd, window_fwd
        from sieve.kernels.nsa import window_tiles as tiles

        o, lse = window_fwd.window_attention_fwd(q, k_win, v_win, packing, w, scale=s)
        args, back = (q, k_win, v_win, packing, w), (do, q, k_win, v_win, lse, lse, packing, w)
        gated = (o, o, gates, torch.empty_like(o), o, lse)
        table = tiles.forward_tile(*dims, q.dtype)
        return {
            "fwd": (lambda t: window_fwd.window_attention_fwd(*args, scale=s, tile=t), table),
            "fwd + gates": (lambda t: window_fwd.window_attention_combine(*args, *gated, scale=s, tile=t), table),
            "dq": (lambda t: window_bwd.window_dq(*back, scale=s, dq=dq, tile=t), tiles.dq_tile(*dims, q.dtype)),
            "dkv": (lambda t: window_bwd.window_dkv(*back, scale=s, tile=t), tiles.dkv_tile(*dims, q.dtype)),
        }
    from sieve.kernels.nsa import compress_fwd, scores_topk
    from sieve.kernels.nsa import compress_tiles as tiles

    o, lse = compress_fwd.compressed_attention_fwd(q, k_cmp, v_cmp, packing, geometry, scale=s)
    if branch == "scores":
        args = (q, k_cmp, lse, packing, geometry)
        table = scores_topk.scores_tile(group, shape.d_qk, q.dtype)
        return {"scores": (lambda t: scores_topk.select_blocks(*args, scale=s, tile=t), table)}
    if branch == "compression":
        from sieve.kernels.nsa import compress_dkv, compress_dq

        args, back = (q, k_cmp, v_cmp, packing, geometry), (do, q, k_cmp, v_cmp, lse, lse, packing, geometry)
        return {
            "fwd": (
                lambda t: compress_fwd.compressed_attention_fwd(*args, scale=s, tile=t),
                tiles.forward_tile(group, *dims, q.dtype),
            ),
            "dq": (
                lambda t: compress_dq.compressed_dq(*back, scale=s, dq=dq, add=True, tile=t),
                tiles.dq_tile(group, *dims, q.dtype),
            ),
            "dkv": (lambda t: compress_dkv.compressed_dkv(*back, scale=s, tile=t), tiles.dkv_tile(*dims, q.dtype)),
        }
    from sieve.kernels.nsa import select_config, select_dkv, select_dq, select_fwd

    indices = scores_topk.select_blocks(q, k_cmp, lse, packing, geometry, scale=s)
    o, lse = select_fwd.selected_attention_fwd(q, k_slc, v_slc, indices, packing, geometry, scale=s)
    args = (q, k_slc, v_slc, indices, packing, geometry)
    back = (do, q, k_slc, v_slc, indices, lse, lse, packing, geometry)
    key = (group, *dims, geometry.block_size, q.element_size())
    return {
        "fwd": (lambda t: select_fwd.selected_attention_fwd(*args, scale=s, tile=t), select_config.forward_tile(*key)),
        "dq": (lambda t: select_dq.selected_dq(*back, scale=s, dq=dq, tile=t), select_config.dq_tile(*key)),
        "dkv": (lambda t: select_dkv.selected_dkv(*back, scale=s, tile=t), select_config.dkv_tile(*key)),
    }


def candidates(table: object) -> list[object]:
    """The table's tile and its neighbours: sides halved or doubled, 4 or 8 warps, one stage fewer or more; and, where
    the launcher can cap registers, so few that two programs of 8 warps fit on a multiprocessor."""
    fields = [name for name in table.__dataclass_fields__ if name not in LAUNCH]
    row, column = (getattr(table, name) for name in fields)
    sides = [(row, column), (row // 2, column), (row * 2, column), (row, column // 2), (row, column * 2)]
    sides += [(row // 2, column * 2), (row * 2, column // 2), (row // 2, column // 2)]
    found = [table]
    for (r, c), warps, more in itertools.product(sides, (4, 8), (-1, 0, 1)):
        if 16 <= c <= 128 and 16 <= r <= 256 and 1 <= table.num_stages + more <= 4:
            sized = dict(zip(fields, (r, c)))
            found.append(replace(table, **sized, num_warps=warps, num_stages=table.num_stages + more))
    if hasattr(table, "max_registers"):
        found += [replace(t, max_registers=128) for t in found if t.num_warps == 8 and t.num_stages == table.num_stages]
    return list(dict.fromkeys(found))


def _compile(calls: list[Call]) -> None:
    """First calls of all, on several threads, since most of their time is compilation; errors show again later."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.exception()
    torch.cuda.synchronize()


def sweep(case: Case, branch: str, rounds: int, only: str | None = None) -> dict[str, list[tuple[object, Timing]]]:
    """Times of each launch by tile, best first; `only` names one launch. Tiles that do not compile are left out."""
    results = {}
    for name, (call, table) in _launches(case, branch).items():
        if only not in (None, name):
            continue
        tiles = candidates(table)
        calls = {str(i): functools.partial(call, tile) for i, tile in enumerate(tiles)}
        _compile(list(calls.values()))
        timed = [(tiles[int(i)], t) for i, t in time_calls(calls, rounds, slice_ms=20.0).items() if not t.error]
        results[name] = sorted(timed, key=lambda pair: pair[1].median)
        for tile, timing in [*results[name][:8], *(pair for pair in results[name][8:] if pair[0] == table)]:
            mark = " <- table" if tile == table else ""
            print(f"  {branch} {name:12} {timing.median:8.3f} ms  {tile}{mark}", flush=True)
    return results
