"""`sieve plan` prints figures for every legal stage, warns, and answers a mistake."""

from __future__ import annotations

from sieve.train.plan import main


def test_a_plan_of_a_large_model(capsys):
    assert main(["model=nsa-27b", "dtype=bf16", "gpus=64", "seq_len=8192", "global_batch=64"]) == 0
    text = capsys.readouterr().out
    assert "zero=0" not in text and all(f"zero={stage}" in text for stage in (1, 2, 3))
    assert "assumptions:" in text and "warning" not in text


def test_nothing_fits(capsys):
    assert main(["model=1b", "dtype=bf16", "gpu_memory_gb=5"]) == 0
    assert "warning: none of these fits into gpu_memory_gb=5" in capsys.readouterr().out


def test_a_wrong_key(capsys):
    assert main(["gpu_memry_gb=5"]) == 2
    assert "gpu_memory_gb" in capsys.readouterr().err
