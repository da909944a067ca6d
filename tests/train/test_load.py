"""A run is opened with the tokenizer it was trained with, whatever has become of its text since."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from sieve.train import evaluate, export
from sieve.train.checkpoint import COMPLETE, Saved, checkpoints, damage
from sieve.train.load import open_model
from sieve.train.overrides import load_config
from sieve.train.run import run

CPU = torch.device("cpu")


@pytest.fixture
def text(tiny_text, tmp_path):
    """A copy of the toy text that a test may change."""
    folder = tmp_path / "text"
    shutil.copytree(tiny_text[1].removeprefix("data.paths=['").removesuffix("']"), folder)
    return folder


@pytest.fixture
def trained(one_rank, tiny_text, text, tmp_path):
    """A run's last checkpoint, of two steps."""
    overrides = [f"data.paths=['{text}']", f"data.cache_dir={tmp_path / 'cache'}", f"runs_dir={tmp_path}", "name=r", "steps=2"]
    assert run(load_config([*tiny_text, *overrides, "eval=none"])) == 0
    return max(checkpoints(tmp_path / "r").items())[1]


def list_again(checkpoint: Path, name: str) -> None:
    """Have COMPLETE hold what the file is now."""
    digest = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    lines = (checkpoint / COMPLETE).read_text().splitlines()
    (checkpoint / COMPLETE).write_text("".join(
        f"{digest}  {name}\n" if line.endswith(f"  {name}") else f"{line}\n" for line in lines
    ))


def write(checkpoint: Path, manifest: dict) -> None:
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    list_again(checkpoint, "manifest.json")


def opened(checkpoint: Path):
    return open_model(str(checkpoint), "runs", CPU, torch.float32)


def test_the_text_may_change_or_vanish(trained, text, tmp_path, capsys):
    before, saved = opened(trained), Saved.read(trained)
    assert damage(trained) is None and "tokenizer.model" in (trained / COMPLETE).read_text()
    assert saved.manifest["tokenizer"]["hash"] == before.tokenizer.hash
    assert list(before.validation()) == list(opened(trained).validation())
    for path in text.iterdir():
        path.write_text(path.read_text().upper())
    after = opened(trained)
    assert after.tokenizer.model == before.tokenizer.model
    assert after.loaded.text.decode([40, 41]) == before.loaded.text.decode([40, 41])
    with pytest.raises(ValueError, match="the text of r has changed since: .* name the text to measure by loss.source"):
        after.validation()
    arguments = [str(trained), f"out={tmp_path / 'out'}", "recall.lengths=[30]", "recall.samples=2", "recall.pairs=[4]"]
    assert evaluate.main([*arguments, "suite=[loss]"]) == 2
    assert "name the text to measure by loss.source" in capsys.readouterr().err
    shutil.rmtree(text)
    assert evaluate.main([*arguments, "suite=[copy]"]) == 0
    assert export.main([str(trained), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == before.tokenizer.model


def test_one_of_an_earlier_version_takes_its_text_s(trained, text, caplog):
    manifest = json.loads((trained / "manifest.json").read_text())
    own = opened(trained).tokenizer
    del manifest["tokenizer"]
    write(trained, manifest)
    with caplog.at_level(logging.WARNING):
        assert opened(trained).tokenizer.hash == own.hash
    assert "has no tokenizer; taking that of the text which its run names" in caplog.text
    manifest["config"]["tokenizer"]["vocab_size"] = 290
    write(trained, manifest)
    with pytest.raises(ValueError, match=f"the tokenizer has 290 pieces and {trained} embeds 300; it is another one's"):
        opened(trained)


def test_a_damaged_checkpoint_is_no_model(trained, caplog):
    """The one before it is taken of a run, and said so."""
    before = trained.with_name("step-00000001")
    shutil.copytree(trained, before)
    path = trained / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{trained} is damaged: rank-00000.safetensors is damaged"):
        opened(trained)
    with caplog.at_level(logging.WARNING):
        assert opened(trained.parent.parent).loaded.decoder is not None
    assert f"passing over {trained}: rank-00000.safetensors is damaged" in caplog.text
    shutil.rmtree(before)
    with pytest.raises(ValueError, match="is neither a checkpoint nor a run with a whole one"):
        opened(trained.parent.parent)


def test_another_file_in_its_place_is_seen(trained):
    (trained / "tokenizer.model").write_bytes(b"other")
    assert "tokenizer.model is damaged" in damage(trained)
    with pytest.raises(ValueError, match="tokenizer.model is damaged"):
        opened(trained)
    list_again(trained, "tokenizer.model")
    assert damage(trained) is None
    with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
        opened(trained)
