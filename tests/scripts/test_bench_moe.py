"""`sieve bench moe` runs whole on the CPU at toy size, times nothing wrong and names mistakes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from sieve.scripts import bench_moe  # noqa: E402
from sieve.scripts.bench import command, moe_parts  # noqa: E402

TINY = "moe --device cpu --tokens 24 --hidden 16 --size 8 --experts 3 --top-k 2 --rounds 1".split()


def test_the_whole_run(tmp_path, capsys):
    assert command.main([*TINY, "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "moe.json").read_text())
    assert set(run["errors"]) == {"torch", "mixed", "triton"}
    found = run["tokens"]["24"]
    assert len(found["products"]) == 6 and len(found["passes"]) == 5
    for calls in (*found["products"].values(), *(p["calls"] for p in found["passes"].values()), found["layers"]["eager"]):
        assert all(timing.get("ms", 0) > 0 for timing in calls.values()), calls
    assert set(found["layers"]["eager"]) == {"dense", "torch", "mixed", "triton"}
    out = capsys.readouterr().out
    assert "grouped products" in out and "whole layer, forward + backward, eager" in out


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    right = moe_parts.check
    monkeypatch.setattr(moe_parts, "check", lambda s, impl: right(s, impl) | ({"dx": float("nan")} if impl == "triton" else {}))
    assert bench_moe.main([*TINY[1:], "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "moe.json").read_text())["tokens"]["24"]
    assert set(found["layers"]["eager"]) == {"dense", "torch", "mixed"}
    assert all("triton" not in calls for calls in found["products"].values())


def test_products_are_products_of_the_same_flops():
    """A plain product beside a grouped one has its multiply-adds; those of weights' gradients to within a tile of 8."""
    sizes = moe_parts.Sizes(64, 16, 8, 4, 2, 1, "cpu", torch.float32)
    for name, calls in moe_parts.products(sizes).items():
        with FlopCounterMode(display=False) as counter:
            calls["plain"]()
        once = 2 * sizes.routes * sizes.hidden * sizes.size
        assert counter.get_total_flops() == once * (2 if "gate_up" in name or "d x" in name else 1), name


@pytest.mark.parametrize("argument, message", [
    ("--tokens=0", "--tokens: 0 is no positive number"), ("--impls=fast", "fast is none of torch, mixed, triton"),
    ("--top-k=99", "--top-k 99 must lie between 1 and --experts 56"), ("--size=12", "--size 12 must be a positive multiple"),
])  # fmt: skip
def test_mistakes(argument, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench_moe.main([argument])
    assert error.value.code == 2 and message in capsys.readouterr().err
