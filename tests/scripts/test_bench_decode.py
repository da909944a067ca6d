"""The decode benchmark's arithmetic, its arguments, and all of its code that needs no GPU, at toy sizes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts import bench_decode
from sieve.scripts.bench import decode_check
from sieve.scripts.bench.cases import Shape
from sieve.scripts.bench.decode_cases import cache_entries, draw, entry_bytes
from sieve.scripts.bench.decode_report import print_layers

PAPER = Geometry(32, 16, 64, 16, 1, 2, 512)


def test_entries_read_at_64k():
    assert cache_entries(65_536, PAPER) == 4095 + 16 * 64 + 512
    assert cache_entries(20, PAPER) == 0 + 20 + 20
    assert cache_entries(100, PAPER) == 5 + 100 + 100
    assert entry_bytes(Shape(64, 4, 128, 128)) * 8 * 65_536 == pytest.approx(1.07e9, rel=0.01)


def test_cpu_run_leaves_tables_and_json(tmp_path, capsys):
    assert bench_decode.main(["--cpu", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "decode.json").read_text())
    assert run["checks"]["4/2/32/32"]["out"] < 1e-5 and len(run["models"]) == 2
    for row in run["models"]:
        assert row["tokens_per_second"]["launches"] > 0 and row["no_graph"] == "the model is on cpu"
        assert 1 <= row["cache_bytes"] / row["formula_bytes"] < 1.1
    for row in run["prefill"]:
        assert list(row["tokens_per_second"]) == ["at once", "4096 at a time"] and min(row["tokens_per_second"].values()) > 0
    said = capsys.readouterr().out
    assert "whole model" in said and "tiny nsa prompt of 300 tokens: at once " in said


def test_a_wrong_result_is_not_timed(tmp_path, capsys, monkeypatch):
    original = decode_check.nsa_decode
    monkeypatch.setattr(decode_check, "nsa_decode", lambda *a, **k: (original(*a, **k)[0] * 1.1, original(*a, **k)[1]))
    assert bench_decode.main(["--cpu", "--out", str(tmp_path)]) == 1
    assert "4/2/32/32 is WRONG" in capsys.readouterr().err

    def lower(*args, **kwargs):  # the last free choice replaced by what was left out
        out, indices = original(*args, **kwargs)
        chosen = indices.clone()
        chosen[0] = torch.where(indices[0] >= 0, indices[0].roll(1, -1), -1)
        return out, chosen.clamp(max=1)

    monkeypatch.setattr(decode_check, "nsa_decode", lower)
    with pytest.raises(RuntimeError, match="out of bounds"):
        decode_check.check(Shape(4, 2, 32, 32), Geometry(8, 4, 16, 4, 1, 2, 24), device="cpu", impl="reference",
                           dtype=torch.float32, tokens=300)  # fmt: skip


def test_layer_table(capsys):
    row = {"shape": "64/4/128/128", "tokens": 65_536, "batch": 8, "bytes": {"nsa": 92e6, "full": 1074e6},
           "errors": {"fa4": "none"},
           "graph": {"nsa": {"ms": 0.04}, "triton": {"ms": 0.3}, "cudnn": {"ms": 0.257}, "nsa: merge": {"ms": 0.002}},
           "launched": {"nsa": {"ms": 0.09}}}  # fmt: skip
    print_layers({"layers": [row, {"skipped": "no room"}], "ceilings": {"bandwidth": 4.2e12}})
    text = capsys.readouterr().out
    assert "cudnn 257.0" in text and "6.42" in text and "merge 2.0" in text and "fa4: none" in text


def test_caches_have_what_decoding_takes():
    case = draw(Shape(4, 2, 32, 16), [40, 3], PAPER, 100, device="cpu", dtype=torch.float32)
    assert [list(x.shape) for x in case.kv[:2]] == [[2, 2, 16, 32], [2, 2, 16, 16]]
    assert case.window_key[0].max() == 39 and (case.window_key[1] >= 0).sum() == 3


def test_arguments(capsys, monkeypatch):
    options = bench_decode._arguments(["--quick"])
    assert options.lengths == [65_536] and options.batches == [8] and not options.models
    for wrong in (["--shapes", "64/4/128"], ["--lengths", "8k"], ["--batches", "0"], ["--rivals", "fa9"]):
        with pytest.raises(SystemExit):
            bench_decode._arguments(wrong)
        assert "usage" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_decode.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_sweep_keeps_the_quickest_of_every_launch(monkeypatch, capsys):
    """With made-up times: 32 keys are quickest at first, 4 stages for selection, shares of 32, and without overlap."""
    pytest.importorskip("triton")
    from sieve.scripts.bench import decode_sweep
    from sieve.scripts.bench.timing import Timing

    def ours(case, tiles):
        if tiles.first.keys == 128 and tiles.first.num_stages == 4:
            raise RuntimeError("out of resource: shared memory")
        times = {"compression, window": tiles.first.keys / 10 + tiles.programs, "merge": 1.0, "weights": tiles.share or 128,
                 "top-n, selection": 9 - tiles.select.num_stages}  # fmt: skip
        return sum(times.values()) + tiles.overlap, SimpleNamespace(calls=times)

    monkeypatch.setattr(decode_sweep, "ours", ours)
    monkeypatch.setattr(decode_sweep, "in_graph", lambda calls: calls[0])
    monkeypatch.setattr(decode_sweep, "time_calls", lambda graphs, rounds, slice_ms: {
        name: Timing(us / 1e3) for name, us in graphs.items()
    })  # fmt: skip
    monkeypatch.setattr(decode_sweep, "caches_for", lambda *case: 1)
    monkeypatch.setattr(decode_sweep, "draw", lambda *args, seed: seed)
    for name in ("synchronize", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(decode_sweep, "multiprocessors", lambda device: 2)
    base = replace(decode_sweep.DecodeTiles.of(16, 128, 128, torch.bfloat16, torch.device("cpu")), overlap=True)
    monkeypatch.setattr(decode_sweep.DecodeTiles, "of", lambda *args: base)
    row = decode_sweep.sweep(Shape(64, 4, 128, 128), PAPER, 65_536, 8, 3)
    assert row["best"][0].startswith("first: keys 32") and "stages 4" in row["best"][1] and row["best"][2] == "share 32"
    assert not any(entry["options"].startswith("select") and "warps 8" in entry["options"] for entry in row["sweep"])
    assert row["sweep"][-4]["options"] == "best of each, launches not overlapped"
    decode_sweep.print_sweep([row])
    text = capsys.readouterr().out
    assert "6 options: RuntimeError: out of resource" in text and "as it is" in text
