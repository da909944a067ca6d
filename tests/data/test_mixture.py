"""The sources of a mixture together: what one is validated on, no other trains on."""

import json

import pytest

from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.mixture import build_corpus


@pytest.fixture
def files(tmp_path):
    """Three files of a few documents each."""
    found = []
    for name in "abc":
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"{name} tells of number {i}, again and again. " * 20} for i in range(30)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(str(path))
    return found


def mixture(tmp_path, **sources):
    return DataConfig(
        name="mix", cache_dir=str(tmp_path / "cache"),
        sources={name: {"type": "files", "weight": 1, **settings} for name, settings in sources.items()},
    )


def test_a_source_validated_on_another_one_s_text_is_refused(tmp_path, files):
    a, b, c = files
    tokenizer = TokenizerConfig(vocab_size=300)
    wrong = mixture(tmp_path, a={"paths": [a], "validation_paths": [b]}, b={"paths": [b, c], "validation_fraction": 0.1})
    with pytest.raises(ValueError, match="data.sources.a.validation_paths and data.sources.b.paths share 1 files, as .*b.json"):
        build_corpus(wrong, tokenizer)
    right = mixture(tmp_path, a={"paths": [a], "validation_paths": [b]}, c={"paths": [c], "validation_fraction": 0.1})
    assert build_corpus(right, tokenizer).validation["a"].num_documents == 30
    gone = mixture(tmp_path, a={"paths": [a], "validation_paths": [b + "x"]}, c={"paths": [c], "validation_fraction": 0.1})
    with pytest.raises(ValueError, match="data.sources.a: data.validation_paths: .*b.jsonlx"):
        build_corpus(gone, tokenizer)
