"""`sieve bench training`: mistakes, what a case stands for, the table, and a tiny model on the CPU."""

import json

import pytest

from sieve.scripts import bench_training
from sieve.scripts.bench.command import main as bench
from sieve.scripts.bench.training_report import loss_lines, table


def test_mistakes_end_at_once(capsys):
    for arguments, message in (
        (["model"], "model is not KEY=VALUE"),
        (["--attention", "dense"], "--attention: dense is not of full, full:varlen, nsa, window"),
        (["--lengths", "0"], "invalid _numbers value"),
        (["--lengths", "16", "--documents", "17"], "--documents 17 does not fit into rows of 16 tokens"),
    ):
        with pytest.raises(SystemExit) as end:
            bench(["training", *arguments])
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, said", [
    (["--models", "tiny,nope"], "model=nope: no such choice; "), (["foo=3"], "foo=3: unknown key; "),
    (["--checkpointing", "some"], "activation_checkpointing=some: must be "),
])
def test_settings_of_no_case_are_told_before_the_first(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_training, "run_case", None)
    small = ["--models", "tiny", "--lengths", "128", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert bench(["training", *small, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"sieve bench training: {said}") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_no_gpu_is_said(device, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench(["training", "--device", device]) == 2
    assert "needs an NVIDIA GPU, and torch sees none; or --device cpu" in capsys.readouterr().err


def test_a_case_as_settings():
    options = bench_training._arguments(["--tokens", "65536", "zero=2"])
    case = {"model": "1b", "attention": "full", "length": 16384, "compile": "auto", "checkpointing": "block",
            "micro_tokens": 32768}
    found = bench_training._overrides(options, case, cuda=True)
    assert {"seq_len=16384", "global_batch=4", "micro_batch=2", "attention.dense_impl=cudnn", "zero=2"} <= set(found)
    long = bench_training._overrides(options, case | {"length": 262144, "attention": "full:varlen"}, cuda=True)
    assert {"global_batch=1", "micro_batch=1"} <= set(long) and "attention.dense_impl=cudnn" not in long


def test_memory_that_is_not_there_is_a_result(monkeypatch):
    """The next checkpointing and micro-batch are tried, and what was tried last is told."""
    options = bench_training._arguments(["--micro-tokens", "32768,8192"])
    case = {"model": "1b", "attention": "nsa", "length": 8192, "compile": "auto"}
    jobs = []

    def run(job, limit):
        jobs.append(job)
        return {"out_of_memory": "CUDA out of memory."} if len(jobs) < 3 else {"step_seconds": 1.0}

    monkeypatch.setattr(bench_training, "run_case", run)
    found = bench_training._measure(options, case, cuda=True)
    assert (found["checkpointing"], found["micro_tokens"]) == ("block", 32768) and "out_of_memory" not in found
    jobs[:] = []
    monkeypatch.setattr(bench_training, "run_case", lambda job, limit: {"out_of_memory": "CUDA out of memory."})
    lost = bench_training._measure(options, case, cuda=True)
    assert table([lost | {"failed": False}]).splitlines()[1].split()[6:] == ["out", "of", "memory"]


def test_the_table_compares_with_the_fastest_full_attention():
    base = {"model": "1b", "length": 8192, "compile": "auto", "checkpointing": "none", "mfu": None, "peak_bytes": 2e9,
            "step_seconds": 1.0, "settings": ["micro_batch=4"]}
    rows = [base | {"attention": name, "tokens_per_second": rate} for name, rate in
            (("full", 100.0), ("full:varlen", 80.0), ("nsa", 150.0))]
    ratios = [line.split()[-3] for line in table(rows).splitlines()[1:]]
    assert ratios == ["1.00", "0.80", "1.50"]


@pytest.mark.slow
def test_a_tiny_model_on_the_cpu(tmp_path, capsys):
    arguments = ["training", "--models", "tiny", "--lengths", "128", "--vocab", "300", "--device", "cpu", "--tokens", "256",
                 "--steps", "2", "--warmup", "1", "--attention", "full,nsa", "--documents", "2", "--out", str(tmp_path)]
    assert bench([*arguments]) == 0
    found = json.loads((tmp_path / "training.json").read_text())
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(256 / row["step_seconds"]) and row["mfu"] is None
        assert sum(row["breakdown"]["parts"].values()) == pytest.approx(row["breakdown"]["step_seconds"])
    assert "x full" in capsys.readouterr().out and "| tiny | nsa |" in (tmp_path / "training.md").read_text()
    assert bench([*arguments[:-2], "--check-losses", "2", "--attention", "full", "--out", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "losses.json").read_text())["rows"][0]
    assert row["fast"]["largest"] == 0 and "largest difference" in loss_lines(row)  # on a CPU the fast path is the plain one
