"""Shards give back what was written wherever they were cut, go on after a stop, and are refused when they changed."""

import json
import shutil

import numpy as np
import pytest

from sieve.data import shards
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.shard_files import FORMAT, MANIFEST, TOKENIZER, write_json
from sieve.data.shard_writer import ShardWriter
from sieve.data.shards import ShardedStore, open_shards, read_manifest
from sieve.data.tokenizer import train
from sieve.data.tokenizer_export import described, save


def written(folder, documents, vocab_size=1 << 16, shard_tokens=100, part="train"):
    """The store of `documents` in FOLDER/train."""
    writer = ShardWriter(folder / part, vocab_size, shard_tokens)
    writer.add([np.array(ids) for ids in documents])
    manifest = {"format": FORMAT, "tokenizer": {"vocab_size": vocab_size}, "parts": {part: writer.finish()}}
    write_json(folder / MANIFEST, manifest)
    return ShardedStore(folder, manifest, part)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shard_tokens", [1, 30, 100, 10_000])
def test_documents_come_back(tmp_path, uneven, shard_tokens):
    store = written(tmp_path, uneven, shard_tokens=shard_tokens)
    assert store.num_documents == len(uneven) and store.num_tokens == sum(map(len, uneven))
    for i in np.random.default_rng(0).permutation(len(uneven)):
        assert store.document(i).tolist() == uneven[i] and store.length(i) == len(uneven[i])
    sizes = [shard.tokens for shard in store.shards]
    assert all(size >= shard_tokens for size in sizes[:-1]) and len(sizes) > 1 or shard_tokens == 10_000
    for outside in (-1, len(uneven)):
        with pytest.raises(IndexError):
            store.document(outside)


def test_id_knows_documents_and_not_shards(tmp_path, uneven):
    ids = [written(tmp_path / str(n), uneven, shard_tokens=n).id for n in (1, 50, 10_000)]
    assert len(set(ids)) == 1
    other = [*uneven[:-2], uneven[-2] + uneven[-1]]
    assert written(tmp_path / "other", other).id != ids[0]


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "<u2"), (65_537, "<u4")])
def test_dtype_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    store = written(tmp_path, [[0, vocab_size - 1]], vocab_size)
    assert store.document(0).dtype == np.dtype(dtype) and store.document(0).tolist() == [0, vocab_size - 1]
    assert type(store.document(0)) is np.ndarray and not store.document(0).flags.writeable


@pytest.mark.parametrize("documents", [[[1, 400]], [[-1, 2]], [[]]])
def test_wrong_ids_are_refused(tmp_path, documents):
    with pytest.raises(ValueError, match="outside of"):
        written(tmp_path, documents, 400)


def test_a_writer_goes_on_from_every_state(tmp_path, uneven):
    documents = [np.array(ids) for ids in uneven]
    expected = written(tmp_path / "whole", uneven)
    for stop in range(len(documents) + 1):
        folder = tmp_path / str(stop) / "train"
        writer = ShardWriter(folder, 1 << 16, 100)
        for ids in documents[:stop]:
            writer.add([ids])
        writer.sync()
        state = json.loads(json.dumps(writer.state))
        writer.add(documents[stop : stop + 9])  # what a kill after the last save leaves behind
        writer.sync()
        again = ShardWriter(folder, 1 << 16, 100, state)
        assert again.num_documents == stop
        again.add(documents[stop:])
        about = again.finish()
        assert about["hash"] == expected.id
        assert contents(folder) == contents(expected.folder)


def test_a_writer_notices_what_is_gone(tmp_path, uneven):
    writer = ShardWriter(tmp_path / "train", 1 << 16, 100)
    writer.add([np.array(ids) for ids in uneven])
    writer.sync()
    state = writer.state
    assert len(state["shards"]) > 2 and state["open"]["documents"]
    current = tmp_path / "train" / f"{len(state['shards']):05d}.tokens"
    current.write_bytes(current.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"{current.name} is shorter than the .* bytes that the journal says"):
        ShardWriter(tmp_path / "train", 1 << 16, 100, state)
    (tmp_path / "train" / "00001.offsets").unlink()
    with pytest.raises(ValueError, match="00001.offsets has -1 bytes instead of"):
        ShardWriter(tmp_path / "train", 1 << 16, 100, state)


@pytest.fixture
def prepared(tmp_path, uneven, tokenizer):
    """A finished folder with its tokenizer, and the settings that read it."""
    folder = tmp_path / "shards"
    parts = {}
    for part, documents in (("train", uneven), ("validation", uneven[:3])):
        writer = ShardWriter(folder / part, tokenizer.vocab_size, 100)
        writer.add([np.array(ids) % 400 for ids in documents])
        parts[part] = writer.finish()
    (folder / TOKENIZER).mkdir()
    save(tokenizer, folder / TOKENIZER)
    write_json(folder / MANIFEST, {"format": FORMAT, "tokenizer": described(tokenizer), "parts": parts})
    return folder, dict(type="shards", paths=str(folder), cache_dir=str(tmp_path / "cache"))


def opened(settings, tokenizer=None, **changed):
    return open_shards(DataConfig(**{**settings, **changed}), tokenizer or TokenizerConfig())


def test_shards_bring_their_tokenizer(prepared, tokenizer, uneven):
    encoder, train_store, validation = opened(prepared[1])
    assert encoder.hash == tokenizer.hash
    assert train_store.num_documents == len(uneven) and validation.num_documents == 3


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train/00000.tokens", "train/00002.offsets", "validation/00000.tokens"])
def test_a_damaged_shard_is_refused_by_name(prepared, name):
    folder, settings = prepared
    opened(settings)
    flip(folder / name)
    with pytest.raises(ValueError, match=f"{name} is damaged: sha256"):
        opened(settings)
    opened(settings, verify="never")
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} has .* bytes instead of"):
        opened(settings, verify="never")


def test_ids_that_cannot_be_are_told_where_nothing_was_verified(prepared):
    folder, settings = prepared
    path = folder / "train/00000.tokens"
    path.write_bytes(b"\xff\xff" + path.read_bytes()[2:])
    _, store, _ = opened(settings, verify="never")
    with pytest.raises(ValueError, match="document 0 has the token 65535, of a vocabulary of .*; data.verify=once tells"):
        store.document(0)
    assert store.document(store.num_documents - 1).size
    offsets = folder / "train/00000.offsets"
    offsets.write_bytes(offsets.read_bytes()[:8] * (offsets.stat().st_size // 8))
    with pytest.raises(ValueError, match="train is damaged: document 0 is empty"):
        opened(settings, verify="never")[1].document(0)


def test_verified_once_unless_told_otherwise(prepared, monkeypatch):
    folder, settings = prepared
    read, real = [], shards.sha256
    monkeypatch.setattr(shards, "sha256", lambda path: read.append(path.name) or real(path))
    opened(settings)
    everything = len(read)
    opened(settings)
    assert everything > 4 and len(read) == everything
    opened(settings, verify="always")
    assert len(read) == 2 * everything
    (folder / "train/00000.tokens").touch()
    opened(settings)
    assert len(read) == 2 * everything + 1


def test_a_failed_verification_is_not_remembered(prepared):
    folder, settings = prepared
    flip(folder / "train/00000.tokens")
    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            opened(settings)


def test_another_tokenizer_is_refused_by_name(prepared, tmp_path, texts, tokenizer):
    _, settings = prepared
    for name, model in (("same.model", tokenizer.model), ("other.model", train(texts, TokenizerConfig(vocab_size=390)).model)):
        (tmp_path / name).write_bytes(model)
    opened(settings, TokenizerConfig(path=str(tmp_path / "same.model")))
    with pytest.raises(ValueError, match=r"shards was made with the tokenizer .*, and tokenizer.path=.*other.model is"):
        opened(settings, TokenizerConfig(path=str(tmp_path / "other.model")))


def test_a_changed_tokenizer_file_is_refused(prepared, texts):
    folder, settings = prepared
    (folder / TOKENIZER / "tokenizer.model").write_bytes(train(texts, TokenizerConfig(vocab_size=390)).model)
    with pytest.raises(ValueError, match="tokenizer.model is the tokenizer .* instead of .*; it was changed"):
        opened(settings)


def test_what_is_no_folder_of_shards(prepared, tmp_path):
    folder, settings = prepared
    with pytest.raises(ValueError, match="nothing is no folder of `sieve prepare`.*it does not exist"):
        read_manifest(tmp_path / "nothing")
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**manifest, "format": 99})
    with pytest.raises(ValueError, match="has format 99, this version reads"):
        opened(settings)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="it has tokenizer, train, validation"):
        opened(settings)
    (folder / "journal.json").write_text("{}")
    with pytest.raises(ValueError, match="is not finished; the same `sieve prepare` goes on"):
        opened(settings)
    with pytest.raises(ValueError, match="data=shards reads one folder"):
        opened(settings, paths=["a", "b"])


def test_choices_of_text_have_no_effect_and_are_told(prepared, caplog):
    folder, settings = prepared
    opened(settings)
    assert not caplog.messages
    _, train_store, _ = opened(settings, validation_fraction=0.3, max_bytes=1000)
    assert train_store.id == opened(settings)[1].id and caplog.messages == [
        "no effect has data.validation_fraction=0.3, data.max_bytes=1000: `sieve prepare` chose and split the documents in "
        f"{folder}; prepare the text anew with it"
    ]


def test_a_tokenizer_that_is_not_the_shards_is_told(prepared, caplog):
    folder, settings = prepared
    for config in (TokenizerConfig(), TokenizerConfig(vocab_size=400, split_digits=False)):
        opened(settings, config)
        assert not caplog.messages
    encoder = opened(settings, TokenizerConfig(vocab_size=32768, type="unigram"))[0]
    assert encoder.vocab_size == 400 and caplog.messages == [
        f"no effect has tokenizer.type=unigram, tokenizer.vocab_size=32768: the shards in {folder} bring the tokenizer they "
        "were made with, of 400 pieces"
    ]


def test_a_copied_folder_is_the_same(prepared, tmp_path):
    folder, settings = prepared
    shutil.copytree(folder, tmp_path / "copy")
    assert opened(settings)[1].id == opened(settings, paths=str(tmp_path / "copy"))[1].id
