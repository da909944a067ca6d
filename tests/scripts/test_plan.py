"""`sieve plan` prints figures for every legal stage, predicts, warns, measures, and answers a mistake."""

from __future__ import annotations

import json

import pytest

from sieve.scripts.plan import main
from sieve.scripts.plan_measure import measured_lines

LARGE = [
    "model=nsa-27b", "dtype=bf16", "gpus=64", "seq_len=8192", "global_batch=512", "micro_batch=4", "zero=3",
    "activation_checkpointing=block", "tokens=1e9",
]


def test_a_plan_of_a_large_model(capsys, tmp_path):
    assert main([*LARGE, "--json", str(tmp_path / "sub" / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "zero=0" not in text and all(f"zero={stage}" in text for stage in (1, 2, 3))
    assert "assumptions:" in text and "warning" not in text and "days" in text
    found = json.loads((tmp_path / "sub" / "plan.json").read_text())
    phase = found["phases"][0]
    assert sum(phase["speed"]["parts"].values()) == pytest.approx(phase["speed"]["step_seconds"])
    assert f"{phase['speed']['tokens_per_second']:,.0f} tokens/s" in text
    assert found["total"]["tokens"] == phase["tokens"] >= 1e9
    assert {row["mode"] for row in phase["memory"]} == {"none", "attention", "block", "full"}
    for row in phase["memory"]:
        kept, held = sum(row["kept_by_part"].values()), sum(row["states_by_part"].values())
        assert row["total"] == kept + held + row["work"]
    assert all(figure["source"] in text for figure in found["figures"].values())
    assert found["command"][:3] == ["sieve", "plan", "model=nsa-27b"]


def test_a_choice_that_does_not_fit(capsys):
    assert main([*LARGE, "zero=1"]) == 0
    assert "warning: zero=1 activation_checkpointing=block does not fit into 141 GB" in capsys.readouterr().out


def test_nothing_fits(capsys):
    assert main(["model=1b", "dtype=bf16", "gpu_memory_gb=5"]) == 0
    assert "warning: none of these fits into 5 GB" in capsys.readouterr().out


def test_phases_are_summed(capsys, tmp_path):
    out = tmp_path / "plan.json"
    phases = "data.phases=[{from_tokens:1000000,seq_len:32768,global_batch:8}]"
    settings = ["model=small", "dtype=bf16", "seq_len=8192", "global_batch=8", "tokens=3e6", phases]
    assert main([*settings, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    first, second = found["phases"]
    assert first["tokens"] == 16 * 65536 and second["tokens"] == 8 * 262144 and found["total"]["steps"] == 24
    assert found["total"]["seconds"] == pytest.approx(first["speed"]["seconds"] + second["speed"]["seconds"])
    assert "phase 1: 32768 tokens a row" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "answer"), [
    (["gpu_memry_gb=5"], "gpu_memory_gb"),
    (["gpus=3"], "global_batch=8 is not divisible by micro_batch=1 times gpus=3"),
    (["gpu=h300"], "h200"),
    (["--json"], "--json wants a file"),
    (["--json", "model=tiny"], "--json wants a file"),
])
def test_a_mistake(arguments, answer, capsys):
    assert main(arguments) == 2
    assert answer in capsys.readouterr().err


def test_fp32_has_no_speed(capsys):
    assert main(["model=small"]) == 0
    assert "no speed is predicted for dtype=fp32" in capsys.readouterr().out


def test_measure_on_a_cpu(capsys, tmp_path):
    out = tmp_path / "plan.json"
    settings = ["model=tiny", "model.num_layers=2", "device=cpu", "seq_len=64", "global_batch=4", "gpus=2", "tokens=1000"]
    assert main([*settings, "--measure", "--json", str(out)]) == 0
    measured = json.loads(out.read_text())["measured"]
    phase = measured["phases"][0]
    assert measured["device"] == "cpu" and "global_batch=2" in phase["settings"]  # a rank's share
    assert phase["tokens_per_second"] == pytest.approx(128 / phase["step_seconds"])
    assert phase["peak_bytes"] > phase["predicted"]["peak_bytes"] > 0
    assert "alone on cpu" in capsys.readouterr().out


def test_measure_refuses_what_a_cpu_cannot(capsys):
    assert main(["model=1b", "device=cpu", "--measure"]) == 2
    error = capsys.readouterr().err
    assert "--measure on a CPU" in error and "model=1b" in error and "model=tiny" in error


def test_measured_stands_beside_predicted():
    side = {"step_seconds": 0.2, "tokens_per_second": 5e4, "mfu": 0.4, "peak_bytes": 2e9}
    phase = {
        "phase": 0, "cuda": True, **side, "breakdown": {"parts": {"matmul": 0.15, "idle": 0.05}},
        "predicted": side | {"step_seconds": 0.1, "parts": {"matmul": 0.1}},
    }
    text = measured_lines({"device": "NVIDIA H200", "phases": [phase, {"phase": 1, "error": "out of memory"}]})
    row = next(line for line in text if "matmul" in line)
    assert row.split() == ["matmul", "100", "150"] and any(line.split() == ["idle", "-", "50"] for line in text)
    assert text[-1] == "  not measured: out of memory"
