"""The figures that predictions stand on are those of the raw data that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sieve.train.gpus import ATTENTION, GPUS, gpu_of
from sieve.train.metrics import peak_flops

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"cudnn": "cudnn", "varlen": "fa2", "scores and top-n": "scores, random"}  # what the benchmark calls a part


def named(part: str) -> tuple[str, str]:
    branch, way = part.split(", ")
    if (branch, way) == ("window", "forward"):
        return "window + gates, random", way  # the window's kernel mixes the branches in its epilogue
    return NAMES.get(branch, f"{branch}, random"), way


@pytest.mark.parametrize("measured", [m for m in ATTENTION if m.source.endswith("attention.json")], ids=lambda m: m.source)
def test_attention_of_json(measured):
    raw = json.loads((ROOT / measured.source).read_text())
    rows = {row["tokens"]: row for row in raw["rows"] if row["shape"] == "/".join(map(str, measured.shape))}
    for part, times in measured.ms.items():
        name, way = named(part)
        assert set(times) == set(rows)
        for tokens, ms in times.items():
            assert ms == pytest.approx(rows[tokens][way][name]["ms"], abs=6e-4), (part, tokens)


@pytest.mark.parametrize("measured", [m for m in ATTENTION if m.source.endswith("table.txt")], ids=lambda m: str(m.shape))
def test_attention_of_a_table(measured):
    text = (ROOT / measured.source).read_text()
    section = text.split("\n" + "/".join(map(str, measured.shape)) + ", 65536 tokens")[1]
    for part, times in measured.ms.items():
        name, way = named(part)
        line = next(line for line in section.splitlines() if re.match(re.escape(name) + r"\s{2}", line))
        numbers = re.findall(r"(\d+\.\d+) *±", line)
        assert times == {65536: float(numbers[0 if way == "forward" else -1])}, part


def small(attention: str) -> dict:
    rows = json.loads((ROOT / "benchmarks/2026-11-24-plan/small-8k.json").read_text())["rows"]
    return next(row for row in rows if row["attention"] == attention)["breakdown"]


def test_attention_of_steps():
    measured = ATTENTION[-1]
    cudnn = sum(k["seconds"] for k in small("full")["kernels"] if re.search(r"compute_dot_do_o|convert_dq", k["name"]))
    for part, times in measured.ms.items():
        if part.startswith("cudnn"):
            seconds = small("full")["parts"][part.replace("cudnn", "full attention")] + cudnn * part.endswith("backward")
        else:
            seconds = small("nsa")["parts"][part]
        assert times == {8192: pytest.approx(1e3 * seconds / 96, rel=4e-3)}, part


def test_ceilings_and_experts():
    for gpu, source in (
        ("h200", "2026-11-24-attention-hopper/group16/attention.json"), ("h100", "2026-11-24-decode/h100.json"),
    ):
        ceilings = json.loads((ROOT / "benchmarks" / source).read_text())["ceilings"]
        assert GPUS[gpu].matmul.value == pytest.approx(ceilings["flops"], rel=1e-3)
        assert GPUS[gpu].bandwidth.value == pytest.approx(ceilings["bandwidth"], rel=1e-3)
    text = (ROOT / "benchmarks/2026-11-24-plan/moe.txt").read_text()
    products = sum(map(float, re.findall(r"plain .*?torch (\d\.\d+) \(", text)))
    rows, hidden, width = 8192 * 6, 1024, 512
    flops = 3 * 2 * rows * hidden * 3 * width
    assert GPUS["h200"].grouped.value == pytest.approx(1e3 * flops / products, rel=5e-3)
    compiled = float(re.search(r"compiled, ms.*?\n  dense.*?\n  torch +(\d\.\d+)", text, re.S)[1])
    shared = 1e3 * 3 * 2 * 8192 * hidden * 3 * width / GPUS["h200"].matmul.value
    size = 2 * (6 * rows * hidden + 2 * 8192 * hidden + 9 * rows * width)
    fastest = 1e3 * size / GPUS["h200"].bandwidth.value
    share = GPUS["h200"].routing["torch"].value
    assert share == pytest.approx(fastest / (compiled - products - shared), rel=0.03)
    passes = {name: float(ms) for name, ms in re.findall(r"^  (\w[\w ]+?) +floor \S+ +triton (\d\.\d+)", text, re.M)}
    spent = passes["sort"] + 2 * passes["copy to rows"] + 2 * passes["sum of routes"]
    spent += passes["swiglu"] + passes["swiglu backward"]
    assert GPUS["h200"].routing["mixed"].value == pytest.approx(fastest / spent, rel=0.03)


def test_names_of_gpus():
    assert gpu_of("NVIDIA H200") == "h200" and gpu_of("NVIDIA H100 80GB HBM3") == "h100" and gpu_of("NVIDIA L40S") is None
    assert all(peak_flops(gpu.device) for gpu in GPUS.values())
