"""`sieve prepare` and `sieve tokenizer` as a user meets them: help, mistakes, and the way from text to a trained model."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.prepare import build_stores
from sieve.scripts.prepare_data import PrepareConfig
from sieve.scripts.prepare_data import main as prepare
from sieve.scripts.train_tokenizer import main as tokenizer
from sieve.train.cli import main as sieve
from sieve.train.overrides import load

WORDS = "time year people way day man thing woman life child world school state family student group country".split()


@pytest.fixture
def corpus(tmp_path):
    draw = random.Random(0)
    for name in "ab":
        texts = [" ".join(draw.choices(WORDS, k=draw.randrange(20, 800))) + ".\n" for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.fixture
def given(corpus):
    return ["data=files", f"data.paths=['{corpus}/*.jsonl']", f"data.cache_dir={corpus}/cache", "data.validation_fraction=0.1"]


def test_help_lists_what_can_be_set(capsys):
    assert sieve(["prepare", "--help"]) == sieve(["tokenizer", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: sieve prepare" in text and "usage: sieve tokenizer" in text
    assert "data=         books | " in text and "  shard_tokens=100000000 " in text and "  held_out_bytes=4000000 " in text
    assert "  tokenizer.type=bpe " in text and "model=" not in text


def test_cfg_job_prints_what_would_run(capsys):
    assert prepare(["--cfg", "job", "data=pg19", "shard_tokens=7"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["data"]["repo"], config["shard_tokens"], config["tokenizer"]["vocab_size"]) == ("emozilla/pg19", 7, 32768)
    assert PrepareConfig.model_validate(config) == load(PrepareConfig, "prepare_data", ["data=pg19", "shard_tokens=7"])


MISTAKES = [
    (["model=small"], "model=small: this command has no such group; there are data, tokenizer"),
    (["data=boks"], "data=boks: no such choice; did you mean data=books?"),
    (["data=files", "data.paths=[/nowhere/at/all]", "out=OUT"], "data.paths: '/nowhere/at/all' does not exist"),
    (["data=files", "out=OUT"], "data.paths is empty"),
    (["data=shards", "data.paths=[x]", "out=OUT"], "data.type=shards holds tokens, not text"),
    (["data=books-python", "out=OUT"], "data.sources={books,python} is a mixture, which training alone reads; prepare each"),
    (["tokenizer.path=nothing", "data.max_bytes=10000", "out=OUT"], "tokenizer.path=nothing cannot be read"),
]
OF_PREPARE = [
    (["shard_token=5"], "shard_token=5: unknown key; did you mean shard_tokens?"),
    (["workers=0"], "workers=0: must be greater than 0"),
]


@pytest.mark.parametrize("command, arguments, said", [
    *((prepare, *mistake) for mistake in MISTAKES + OF_PREPARE), *((tokenizer, *mistake) for mistake in MISTAKES),
])
def test_a_mistake_ends_with_code_2_and_no_traceback(command, arguments, said, capsys, tmp_path):
    assert command([a.replace("OUT", str(tmp_path / "out")) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_from_text_to_training(given, corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    assert tokenizer([*given, "tokenizer.vocab_size=300", "out=tok"]) == 0
    said = capsys.readouterr().out
    report = json.loads((corpus / "tok" / "report.json").read_text())
    assert f"{report['held_out']['bytes_per_token']:.3f} bytes per token" in said
    assert report["held_out"]["bytes_per_token"] > 1.3 and report["export"]["equal"] == report["export"]["pieces"] > 5
    assert tokenizer([*given, "out=tok"]) == 2
    assert "out=tok is there already" in capsys.readouterr().err

    assert prepare([*given, "tokenizer.path=tok", "out=shards/words", "workers=1", "shard_tokens=5000"]) == 0
    said = capsys.readouterr().out
    assert "shards/words is complete; train from it with: sieve train data=shards data.paths=shards/words" in said
    shards = DataConfig(type="shards", paths="shards/words", cache_dir=str(corpus / "cache"))
    stores = build_stores(shards, TokenizerConfig())
    assert stores.tokenizer.hash == report["tokenizer"]["hash"] and len(stores.train.shards) > 2
    assert stores.train.num_documents == 108 and stores.validation.num_documents == 12


def test_a_signal_saves_and_says_so(given, corpus, capsys, monkeypatch):
    from sieve.train.signals import StopSignal

    enter = StopSignal.__enter__
    monkeypatch.setattr(StopSignal, "__enter__", lambda self: setattr(enter(self), "requested", "SIGINT") or self)
    arguments = [*given, "tokenizer.vocab_size=300", f"out={corpus}/out", "workers=1"]
    assert prepare(arguments) == 130
    assert "stopped and saved in" in capsys.readouterr().out and (corpus / "out" / "journal.json").exists()


@pytest.mark.slow
def test_training_from_shards_equals_training_from_text(given, corpus, tmp_path):
    """The same documents in the same order: equal losses and equal data/tokens_hash, at every step."""
    common = [
        f"data.cache_dir={corpus}/cache", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=4",
        "model.head_dim_qk=8", "model.head_dim_v=8", "model.intermediate_size=48", "seq_len=64", "global_batch=2",
        "attention=full", "device=cpu", "logger=none", "eval.every=3", "eval.rows=2", "log.every=1", "steps=6",
        f"runs_dir={tmp_path}/runs",
    ]
    words = ["tokenizer.vocab_size=300"]
    assert prepare([*given, *words, f"out={tmp_path}/shards", "workers=1", "shard_tokens=5000"]) == 0
    rows = []
    for name, data in (("text", [*given, *words]), ("shards", ["data=shards", f"data.paths=['{tmp_path}/shards']"])):
        command = [sys.executable, "-m", "sieve.train", *data, *common, f"name={name}"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines])
    assert len(rows[0]) == 6 and rows[0] == rows[1]


@pytest.mark.slow
def test_kills_at_any_moment_do_not_show(given, corpus):
    """From the start of the process on: while it imports, trains the tokenizer, verifies, writes, and ends."""
    draw, kills = random.Random(), 0
    program = "import sys; from sieve.scripts.prepare_data import main; sys.exit(main(sys.argv[1:]))"

    def start(out, seconds=None, cache="killed"):
        arguments = [*(a for a in given if "cache_dir" not in a), f"data.cache_dir={corpus}/cache-{cache}",
                     "tokenizer.vocab_size=300", "shard_tokens=5000", "save_every=0.01", f"out={corpus}/{out}", "workers=2"]
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return process.wait()

    def contents(out):
        folder = corpus / out
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    begun = time.monotonic()
    assert start("whole", cache="whole") == 0
    length = time.monotonic() - begun
    for round in range(5):
        code = None
        while code != 0:
            code = start(f"out{round}", draw.uniform(0.3, 1.1) * length)
            kills += code == -signal.SIGKILL
        assert contents(f"out{round}") == contents("whole")
    assert kills >= 5
