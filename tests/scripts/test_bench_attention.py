"""The benchmark's arithmetic and arguments; its measurements need a GPU."""

import pytest
import torch

from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts import bench_attention
from sieve.scripts.bench.cases import Shape, least_flops, visible_pairs

PAPER = Geometry(32, 16, 64, 16, 1, 2, 512)


def test_pairs_are_those_of_the_masks():
    g = Geometry(kernel_size=8, kernel_stride=4, block_size=16, topk=3, init_blocks=1, local_blocks=1, window_size=12)
    t = torch.arange(100)
    pairs = visible_pairs(100, g)
    blocks = torch.arange(25)
    assert pairs["compression"] == (blocks * 4 + 7 <= t[:, None]).sum()
    chosen = [{*range(max(q // 16 - 2, 0), q // 16 + 1)} for q in range(100)]
    assert pairs["selection"] == sum(k // 16 in chosen[q] and k <= q for q in range(100) for k in range(100))
    assert pairs["window"] == sum(q - 12 < k <= q for q in range(100) for k in range(100))
    assert pairs["dense"] == 5050


def test_the_floor_at_64k_is_the_known_one():
    forward, backward = least_flops(Shape(64, 4, 128, 128), 65_536, PAPER)
    assert forward["operator"] / 776e12 == pytest.approx(12.7e-3, rel=0.02)
    assert backward["operator"] / 776e12 == pytest.approx(24.7e-3, rel=0.02)
    assert forward["dense"] == pytest.approx(106.5e-3 * 661e12, rel=0.02)


def test_arguments(capsys):
    assert bench_attention._arguments(["attention", "--quick"]).lengths == "8192,65536"
    for wrong in (
        ["--shapes", "64/4/128"], ["--lengths", "8k"], ["--rivals", "fa9"], ["--inputs", "real"], ["--only", "all"],
        ["decoding"],
    ):
        with pytest.raises(SystemExit):
            bench_attention._arguments(wrong)
        assert "usage" in capsys.readouterr().err
    with pytest.raises(ValueError, match="64/4/128"):
        Shape.parse("64/4/x")


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_attention.main(["attention"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_sweep_varies_the_table():
    pytest.importorskip("triton")
    from sieve.kernels.nsa.window_tiles import Tile
    from sieve.scripts.bench.sweep import candidates

    table = Tile(128, 64, 8, 3)
    found = candidates(table)
    assert found[0] == table and len(found) == len(set(found)) > 20


def test_crossover_is_where_the_gain_changes_sign():
    pytest.importorskip("triton")
    from sieve.scripts.bench.report import crossovers

    def row(tokens, ours, theirs, rival="fa4"):
        sides = {"ours, random": {"ms": ours / 2}, "fa4": {"ms": theirs / 2}, "fla": {"error": "none"}}
        return {"shape": "a", "tokens": tokens, "whole": [*sides], "rival": rival, "forward": sides, "backward": sides}

    slower, faster = row(4096, 2.0, 1.0), row(16384, 2.0, 4.0)
    assert crossovers([faster, slower])["a"]["ours, random"] == pytest.approx(8192)
    assert crossovers([slower])["a"] == {"ours, random": "above 4096"}
    assert crossovers([faster])["a"] == {"ours, random": "below 16384"}
    assert crossovers([row(4096, 1.0, 1.0, None)]) == {}


def test_a_wrong_shape_is_not_timed(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton")
    from sieve.scripts.bench import check, report, timing

    good, bad = Shape(16, 4, 128, 128), Shape(16, 8, 64, 64)
    found = {
        good: {"random": {"out": 1e-3, "same_selection": 1.0}, "structured": "NaN"},
        bad: {"random": "no", "structured": "no"},
    }
    timed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(check, "check_shapes", lambda shapes, *_: {shape: found[shape] for shape in shapes})
    monkeypatch.setattr(report, "origin", lambda argv: {"gpu": "none", "command": "test", "commit": "0"})
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr(timing, "measure_ceilings", lambda: timing.Ceilings(1.0, 1.0))
    monkeypatch.setattr(bench_attention, "_row", lambda shape, tokens, geometry, kinds, *_: timed.append((shape, kinds)) or {
        "shape": str(shape), "tokens": tokens, "whole": [], "rival": None, "forward": {}, "backward": {}
    })
    argv = ["--shapes", f"{bad},{good}", "--lengths", "4096", "--out", str(tmp_path)]
    assert bench_attention.main(argv) == 1
    assert timed == [(good, ["random"])]
    assert "16/8/64/64, random is WRONG and is not timed: no" in capsys.readouterr().err
