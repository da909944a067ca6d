"""What is measured is held-out text alone, and the numbers are those of the ids."""

import pytest

from sieve.data.config import DataConfig
from sieve.data.prepare import text_passes
from sieve.data.tokenizer_export import save
from sieve.data.tokenizer_report import compare_export, held_out, measure


def test_figures_are_of_the_ids(tokenizer, texts):
    about = measure(tokenizer, texts[:3])
    ids = [i for text in texts[:3] for i in tokenizer.encode([text])[0].tolist()]
    assert (about["documents"], about["tokens"]) == (3, len(ids))
    assert about["bytes"] == sum(len(text.encode()) for text in texts[:3])
    assert about["bytes_per_token"] == about["bytes"] / len(ids)
    assert about["vocabulary_seen"] == len(set(ids)) / 400
    assert measure(tokenizer, []) == {"documents": 0, "bytes": 0, "tokens": 0}


@pytest.fixture
def folder(tmp_path, texts):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    return tmp_path / "texts"


def test_held_out_text_is_the_splits(folder, texts, tmp_path):
    settings = dict(type="files", paths=str(folder), validation_fraction=0.25)
    assert sorted(held_out(text_passes(DataConfig(**settings)), 10**6, 10**6)) == sorted(texts[::4])
    assert len(list(held_out(text_passes(DataConfig(**settings)), 10**6, 1))) == 1
    (tmp_path / "held.txt").write_text("by itself")
    own = DataConfig(**settings, validation_paths=str(tmp_path / "held.txt"))
    assert list(held_out(text_passes(own), 10**6, 10**6)) == ["by itself"]


def test_exports_are_compared(tokenizer, texts, tmp_path):
    save(tokenizer, tmp_path)
    assert compare_export(tokenizer, tmp_path, texts) == {"pieces": len(texts), "equal": len(texts)}
    different = [*texts[:2], "<s>"]  # for transformers a special token, for us text
    assert compare_export(tokenizer, tmp_path, different) == {"pieces": 3, "equal": 2}
