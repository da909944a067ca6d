"""profile=true: what is written and printed, and that the table adds up."""

import gzip
import json

import pytest

from sieve.train.overrides import load_config
from sieve.train.run import run


def test_a_profile_of_two_steps(tiny_text, one_rank, tmp_path, capsys):
    settings = ["profile.enabled=true", "profile.after=1"]
    config = load_config([
        *tiny_text, *settings, "profile.steps=2", "attention=nsa", "steps=4", "eval=none", f"runs_dir={tmp_path}", "name=run",
    ])
    assert run(config) == 0
    folder = tmp_path / "run" / "profile"
    found = json.loads((folder / "breakdown.json").read_text())
    assert found["device"] == "cpu" and found["steps"] == 2
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"], rel=1e-6)
    assert {"matmul", "loss", "optimizer", "data wait", "idle"} <= found["parts"].keys()
    assert json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]
    printed = capsys.readouterr().out
    assert "profile of steps 2 to 3" in printed and "100.0%" in printed


def test_the_switch_and_a_run_too_short(tiny_text, one_rank, tmp_path, capsys):
    config = load_config([
        *tiny_text, "profile=true", "attention=full", "steps=2", "eval=none", f"runs_dir={tmp_path}", "name=run",
    ])
    assert config.profile.enabled and config.profile.after == 10
    assert run(config) == 0
    assert "nothing is profiled" in capsys.readouterr().err and not (tmp_path / "run" / "profile").exists()
