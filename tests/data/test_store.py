"""A store gives back what was written, in the smallest dtype, and notices when its files are not what they were."""

import json

import numpy as np
import pytest

from sieve.data.store import StoreWriter, TokenStore


def test_documents_come_back(make_store, uneven):
    store = make_store(uneven)
    assert store.num_documents == len(uneven) and store.num_tokens == sum(map(len, uneven))
    for i, ids in enumerate(uneven):
        assert store.document(i).tolist() == ids and store.length(i) == len(ids)


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "<u2"), (65_537, "<u4")])
def test_dtype_holds_the_vocabulary(make_store, vocab_size, dtype):
    store = make_store([[0, vocab_size - 1]], vocab_size)
    assert store.manifest["dtype"] == dtype and store.document(0).dtype == np.dtype(dtype)
    assert store.document(0).tolist() == [0, vocab_size - 1]


def test_many_small_writes_equal_one(tmp_path, uneven):
    ids = []
    for name, groups in (("one", [uneven]), ("many", [[d] for d in uneven] + [[]])):
        (tmp_path / name).mkdir()
        writer = StoreWriter(tmp_path / name, 5000)
        for group in groups:
            writer.add([np.array(d) for d in group])
        writer.finish()
        ids.append(TokenStore(tmp_path / name).id)
    assert ids[0] == ids[1]


def test_id_tells_tokens_and_cuts(make_store):
    stores = [make_store(d) for d in ([[1, 2], [3, 4]], [[1, 2], [3, 5]], [[1, 2, 3], [4]])]
    assert len({store.id for store in stores}) == 3


@pytest.mark.parametrize("documents", [[[1, 400]], [[-1, 2]], [[]]])
def test_wrong_ids_are_refused(make_store, documents):
    with pytest.raises(ValueError, match="outside of"):
        make_store(documents, 400)


def test_empty_store_is_refused(make_store):
    with pytest.raises(ValueError, match="at least one document"):
        make_store([])


def damage(store, how):
    tokens = store.folder / "tokens.bin"
    if how == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif how == "flipped":
        tokens.write_bytes(tokens.read_bytes()[:-1] + b"\x7f")
    elif how == "absent":
        (store.folder / "offsets.bin").unlink()
    elif how == "no manifest":
        (store.folder / "manifest.json").unlink()
    else:
        manifest = json.loads((store.folder / "manifest.json").read_text())
        (store.folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize("how, said", [
    ("cut", "bytes instead of"), ("flipped", "damaged: sha256"), ("absent", "offsets.bin has -1"),
    ("no manifest", "no token store"), ("future", "format 99"),
])
def test_damage_is_noticed(make_store, uneven, how, said):
    store = make_store(uneven)
    damage(store, how)
    with pytest.raises(ValueError, match=said):
        TokenStore(store.folder)


def test_checksum_can_be_waived(make_store, uneven):
    store = make_store(uneven)
    damage(store, "flipped")
    TokenStore(store.folder, checksum=False)
