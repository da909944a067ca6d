"""Settings: defaults by type, errors that name the key, and the shipped YAML files."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from sieve.data.config import DataConfig, TokenizerConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def shipped(group):
    return sorted((CONFIGS / group).glob("*.yaml"))


def test_python_is_capped_and_files_are_whole():
    python, files = DataConfig(), DataConfig(type="files", paths="a.txt")
    assert (python.name, python.min_bytes, python.max_bytes) == ("python", 256, 24_000_000)
    assert (python.validation_fraction, files.validation_fraction) == (0.02, 0.01)
    assert (files.name, files.min_bytes, files.max_bytes) == ("files", 1, None)
    assert DataConfig(max_bytes=None).max_bytes is None and DataConfig(min_bytes=9).min_bytes == 9


def test_one_path_is_a_list_of_one():
    assert DataConfig(type="files", paths="a.txt").paths == ("a.txt",)
    assert DataConfig(type="files", paths=["a", "b"], validation_paths=None).validation_paths == ()


@pytest.mark.parametrize("settings, said", [
    (dict(text_feild="x"), "no key 'text_feild'; did you mean text_field"),
    (dict(zzz=1), "no key 'zzz'; it has name, type, paths"),
    (dict(paths="a.txt"), "data.type=python reads no files; choose data=files"),
    (dict(validation_fraction=0.7), "validation_fraction"),
    (dict(type="hup"), "'python', 'files'"),
    (dict(type="hub", paths="a"), "data.paths is given, but data.type=hub reads no files; choose data=files"),
    (dict(repo="a/b"), "data.repo is given, but data.type=python does not read it; choose data=hub"),
])
def test_mistakes_are_named(settings, said):
    with pytest.raises(ValidationError, match=said):
        DataConfig(**settings)


@pytest.mark.parametrize("tokens, said", [
    (["a b", ""], "'' has no visible character"),
    (["\u2581 \t"], "has no visible character"),
    (["<a>", "<b>", "<a>"], "'<a>' is there twice; name each once"),
    *(([name], f"'{name}' is a piece of every trained tokenizer") for name in ("<unk>", "<s>", "</s>", "<pad>", "<0x0A>")),
])
def test_special_tokens_have_names_of_their_own(tokens, said):
    with pytest.raises(ValidationError, match=said):
        TokenizerConfig(special_tokens=tokens)
    assert TokenizerConfig(special_tokens=["a b", "<0xYZ>", "<S>"]).special_tokens == ("a b", "<0xYZ>", "<S>")


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TokenizerConfig().vocab_size = 7


@pytest.mark.parametrize("path", shipped("data") + shipped("tokenizer"), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_files_are_valid(path, monkeypatch):
    monkeypatch.setenv("SIEVE_BOOKS", "/texts")
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    config = {"data": DataConfig, "tokenizer": TokenizerConfig}[path.parent.name](**values)
    assert config.name == path.stem
    if path.stem == "books":
        assert config.paths == ("/texts/books-train-*.jsonl.zst",)
