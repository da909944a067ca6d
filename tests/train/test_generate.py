"""`sieve generate` on a run, a checkpoint and an exported folder."""

import io
import subprocess
import sys

import pytest
import torch

from sieve.model.hf import SieveForCausalLM
from sieve.train import generate
from sieve.train.checkpoint import checkpoints
from sieve.train.load import open_model
from sieve.train.overrides import load_config
from sieve.train.run import run

CPU = torch.device("cpu")


@pytest.fixture
def trained(one_rank, tiny_text, tmp_path):
    """A run's folder after two steps."""
    config = load_config([*tiny_text, f"runs_dir={tmp_path}", "name=r", "steps=2", "attention=nsa", "eval.every=0"])
    assert run(config) == 0
    return tmp_path / "r"


def test_from_a_run_and_from_its_export(trained, tmp_path, capsys):
    opened = open_model("r", str(tmp_path), CPU, torch.float32)
    decoder = opened.loaded.decoder
    (checkpoint,) = checkpoints(trained).values()
    other = open_model(str(checkpoint), "runs", CPU, torch.float32).loaded
    for (name, mine), theirs in zip(decoder.state_dict().items(), other.decoder.state_dict().values()):
        assert torch.equal(mine, theirs) and mine.isfinite().all(), name
    exported = tmp_path / "exported"
    SieveForCausalLM.of(decoder).save_pretrained(exported)
    (exported / "tokenizer.model").write_bytes(opened.tokenizer.model)
    outputs = []
    for where in (["r", "--runs-dir", str(tmp_path)], [str(exported)], [str(exported), "--no-stream", "--prefill", "3"]):
        capsys.readouterr()
        assert generate.main([*where, "--prompt", "abc def", "--max-tokens", "12", "--temperature", "1", "--seed", "5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("abc def") and len(outputs[0]) > 10
    assert outputs[0] == outputs[1] == outputs[2]
    assert generate.main([str(exported), "--prompt", "abc", "--prompt", "pon", "--max-tokens", "3"]) == 0
    lines = capsys.readouterr().out
    assert lines.startswith("abc") and "\npon" in lines


def test_users_mistakes(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["nowhere", "--prompt", "a"], "nowhere is neither a folder nor a run under runs"),
        ([str(tmp_path / "empty"), "--prompt", "a"], "empty is no model: neither a run with checkpoints"),
        (["x"], "no prompt: give --prompt TEXT"),
        (["x", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: Input should be greater than 0"),
        (["x", "--prompt", "a", "--prefill", "0"], "--prefill 0: must be at least 1"),
        (["x", "--prompt-file", "/nowhere/x"], "--prompt-file /nowhere/x: [Errno 2]"),
    ):
        assert generate.main(arguments) == 2
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert generate.main(["x", "--prompt", "a", "--device", "cuda"]) == 2
        assert "torch finds no GPU here" in capsys.readouterr().err


def test_a_prompt_from_standard_input(tmp_path, capsys, monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii", errors="surrogateescape"))

    given("é\r\nb\n".encode())
    assert generate._standard_input() == "é\nb\n"
    given(b"a\xff")
    assert generate.main(["x", "--prompt", "-"]) == 2
    captured = capsys.readouterr()
    assert "--prompt -: standard input is not UTF-8" in captured.err and "position 1" in captured.err and not captured.out
    given(b"a")
    assert generate.main(["x", "--prompt", "-", "--prompt", "b", "--prompt", "-"]) == 2
    assert "--prompt -: is given twice" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from sieve.train.generate import parser; parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
