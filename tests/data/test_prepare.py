"""From files to stores: the right tokens, made once, never half, and found again."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from sieve.data import prepare
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.prepare import build_stores


@pytest.fixture
def corpus(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    return tmp_path / "texts"


@pytest.fixture
def settings(tmp_path, corpus):
    return dict(type="files", paths=str(corpus), validation_fraction=0.25, cache_dir=str(tmp_path / "cache"), threads=1)


SMALL = TokenizerConfig(vocab_size=320)


def texts_of(store, tokenizer):
    return [tokenizer.decode(store.document(i)) for i in range(store.num_documents)]


def test_stores_hold_the_documents(settings, texts):
    tokenizer, train, validation = build_stores(DataConfig(**settings), SMALL)
    assert texts_of(validation, tokenizer) == texts[::4]
    assert texts_of(train, tokenizer) == [t for i, t in enumerate(texts) if i % 4]
    for store in (train, validation):
        for i in range(store.num_documents):
            ids = store.document(i)
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert not np.isin(ids[1:-1], [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, 0]).any()
    assert train.manifest["tokenizer"] == tokenizer.hash and train.manifest["source"]["files"] == len(texts)
    assert validation.manifest["part"] == "validation"


def test_validation_of_its_own(settings, tmp_path, texts):
    (tmp_path / "held.txt").write_text("held out text")
    data = DataConfig(**{**settings, "validation_paths": str(tmp_path / "held.txt")})
    tokenizer, train, validation = build_stores(data, SMALL)
    assert texts_of(validation, tokenizer) == ["held out text"] and texts_of(train, tokenizer) == texts


def test_validation_may_not_be_training_text(settings, corpus):
    with pytest.raises(ValueError, match="share 1 files, as .*00.txt"):
        build_stores(DataConfig(**{**settings, "validation_paths": str(corpus / "00.txt")}), SMALL)


def test_a_single_file_is_enough(settings, corpus, tmp_path, texts):
    (tmp_path / "input.txt").write_text("".join(texts))
    tokenizer, train, validation = build_stores(DataConfig(**{**settings, "paths": str(tmp_path / "input.txt")}), SMALL)
    assert texts_of(train, tokenizer)[0] + texts_of(validation, tokenizer)[0] == "".join(texts)


def test_tokenizer_never_sees_validation(settings, monkeypatch, texts):
    seen = []
    real = prepare.train
    monkeypatch.setattr(prepare, "train", lambda sample, config: seen.extend(sample) or real(sample, config))
    build_stores(DataConfig(**settings), SMALL)
    assert sorted(seen) == sorted(t for i, t in enumerate(texts) if i % 4)


def test_second_start_builds_nothing(settings, monkeypatch):
    first = build_stores(DataConfig(**settings), SMALL)
    monkeypatch.setattr(prepare, "train", None)
    monkeypatch.setattr(prepare, "_tokenize", None)
    # Neither the name, the threads nor what may be skipped changes the tokens.
    again = build_stores(DataConfig(**{**settings, "name": "other", "threads": 2, "max_broken": 3}), SMALL)
    assert again.train.folder == first.train.folder and again.tokenizer.hash == first.tokenizer.hash


@pytest.mark.parametrize("change", [dict(min_bytes=2000), dict(max_bytes=9000), dict(validation_fraction=0.5)])
def test_other_text_is_another_store(settings, change):
    first = build_stores(DataConfig(**settings), SMALL)
    other = build_stores(DataConfig(**{**settings, **change}), SMALL)
    assert other.train.folder != first.train.folder


def test_changed_text_or_tokenizer_is_another_store(settings, corpus, tmp_path):
    first = build_stores(DataConfig(**settings), SMALL)
    other = build_stores(DataConfig(**settings), TokenizerConfig(vocab_size=330))
    assert other.train.id != first.train.id and other.tokenizer.vocab_size == 330
    path = tmp_path / "given.model"
    path.write_bytes(first.tokenizer.model)
    given = build_stores(DataConfig(**settings), TokenizerConfig(path=str(path), vocab_size=9999))
    assert given.train.folder == first.train.folder
    (corpus / "01.txt").write_text((corpus / "01.txt").read_text().replace("time", "tide"))
    changed = build_stores(DataConfig(**settings), TokenizerConfig(path=str(path)))
    assert changed.train.id != first.train.id


def test_damaged_store_is_built_again(settings, caplog):
    first = build_stores(DataConfig(**settings), SMALL)
    tokens = first.train.folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    again = build_stores(DataConfig(**settings), SMALL)
    assert again.train.id == first.train.id and "building anew" in caplog.text


def test_buffers_and_threads_do_not_change_the_store(settings, tmp_path, monkeypatch):
    first = build_stores(DataConfig(**settings), SMALL)
    monkeypatch.setattr(prepare, "BUFFER_CHARS", 1)
    other = build_stores(DataConfig(**{**settings, "cache_dir": str(tmp_path / "other"), "threads": 3}), SMALL)
    assert other.train.id == first.train.id and other.validation.id == first.validation.id


def test_too_little_text_says_so(settings, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match="tokenizer.vocab_size=320 is more than the training text"):
        build_stores(DataConfig(**{**settings, "paths": str(tmp_path / "one.txt")}), SMALL)
    with pytest.raises(ValueError, match="no document in .* 12 under 1000000 bytes"):
        build_stores(DataConfig(**{**settings, "min_bytes": 1_000_000}), SMALL)


def test_a_sample_without_training_text_says_so(settings, tmp_path, texts):
    file = tmp_path / "a.jsonl"  # its first document validates
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(ValueError, match=r"^tokenizer.sample_bytes=10: so little of .*a.jsonl has no training text; raise it"):
        build_stores(DataConfig(**{**settings, "paths": str(file)}), SMALL.model_copy(update={"sample_bytes": 10}))


def test_no_validation_text_says_so(settings, tmp_path, texts, tokenizer):
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    with pytest.raises(ValueError, match=r"no validation document in \S*one.txt .*its one document is too short to be cut"):
        build_stores(DataConfig(**{**settings, "paths": str(tmp_path / "one.txt")}),
                     TokenizerConfig(path=str(tmp_path / "t.model")))
    assert not list((tmp_path / "cache" / "tokens").glob("*/"))


def test_a_broken_validation_document_says_what_to_change(settings, corpus):
    (corpus / "00.txt").write_bytes(b"\xff\xfe broken")
    with pytest.raises(ValueError, match="raise data.validation_fraction") as error:
        build_stores(DataConfig(**{**settings, "validation_fraction": 0.02}), SMALL)
    said = str(error.value)
    assert f"no validation document in 12 files, the first {corpus}/00.txt (1 broken and 0 under 1 bytes left out)" in said
    assert "one of 50 documents validates" in said and "(about 0.02 now), or give data.validation_paths" in said


def test_broken_validation_files_are_named(settings, tmp_path):
    (tmp_path / "held.txt").write_bytes(b"\xff\xfe broken")
    with pytest.raises(ValueError, match=r"no validation document in \S*held.txt .*name other files") as error:
        build_stores(DataConfig(**{**settings, "validation_paths": str(tmp_path / "held.txt")}), SMALL)
    assert "validation_fraction" not in str(error.value)


def test_python_corpus_by_default(tmp_path):
    data = DataConfig(max_bytes=150_000, cache_dir=str(tmp_path), validation_fraction=0.2)
    first = build_stores(data, TokenizerConfig(vocab_size=600))
    again = build_stores(data, TokenizerConfig(vocab_size=600))
    assert first.train.id == again.train.id and first.train.manifest["source"]["type"] == "python"


PROGRAM = textwrap.dedent("""
    import json, os, signal, sys
    from sieve.data import prepare, store
    from sieve.data.config import DataConfig, TokenizerConfig
    settings, killed = json.loads(sys.argv[1]), sys.argv[2] == "kill"
    prepare.BUFFER_CHARS = 1
    real = store.StoreWriter.add
    def add(self, documents):
        real(self, documents)
        if killed and self.num_documents == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    store.StoreWriter.add = add
    stores = prepare.build_stores(DataConfig(**settings), TokenizerConfig(vocab_size=320))
    print(stores.train.id, stores.tokenizer.hash)
""")


def started(settings, mode):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(settings), mode], stdout=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)


def test_killed_build_leaves_nothing_that_counts(settings, tmp_path):
    process = started(settings, "kill")
    process.communicate()
    assert process.returncode == -9
    folders = [p.name for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]
    assert len(folders) == 2 and all(".tmp-" in name for name in folders)
    stores = build_stores(DataConfig(**settings), SMALL)
    assert stores.train.num_documents == 9
    left = [p.name for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]
    assert sorted(left) == sorted([stores.train.folder.name, stores.validation.folder.name])


def test_two_builders_at_once_agree(settings):
    processes = [started(settings, "both") for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and printed[0] == printed[1]
