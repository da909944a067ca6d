"""The benchmark runs, counts the same tokens on both sides, and leaves its raw figures."""

import argparse
import json
import random

import pytest

from sieve.data.config import TokenizerConfig
from sieve.data.tokenizer import train
from sieve.scripts import bench_prepare


@pytest.fixture
def text(tmp_path):
    lines = [f"{argparse.__doc__}{json.__doc__}{random.__doc__}{i}" for i in range(99)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "t.model").write_bytes(train(lines, TokenizerConfig(vocab_size=400)).model)
    return [str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "t.model")]


@pytest.mark.slow
def test_a_round_leaves_its_figures(text, tmp_path, capsys):
    bench_prepare.main([*text, "--cores", "1", "--rounds", "1", "--out", str(tmp_path / "out")])
    assert "1 cores: tokenizer alone" in capsys.readouterr().out
    run = json.loads((tmp_path / "out" / "prepare.json").read_text())
    (result,) = run["results"]
    (figures,) = result["rounds"]
    assert figures["tokens"] > 10_000 and result["median_ratio"] == figures["ratio"]
    assert figures["ratio"] == pytest.approx(figures["tokenizer_seconds"] / figures["prepare_seconds"])
    assert result["median_cpu_ratio"] == pytest.approx(figures["tokenizer_cpu_seconds"] / figures["prepare_cpu_seconds"])
    assert run["packages"]["sentencepiece"] and run["cpu"]


def test_too_many_cores(text):
    with pytest.raises(SystemExit):
        bench_prepare.main([*text, "--cores", "100000"])


def test_what_is_not_there_is_told_before_any_process(text, capsys, monkeypatch):
    monkeypatch.setattr(bench_prepare, "measure", None)
    assert bench_prepare.main(["/nope", *text[1:]]) == 2
    assert capsys.readouterr().err.startswith("sieve bench prepare: PATHS: '/nope' ")
    assert bench_prepare.main([text[0], "--tokenizer", "/nope"]) == 2
    assert "tokenizer.path=/nope cannot be read: /nope: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_prepare.main([*text, "--rounds", "0"])
