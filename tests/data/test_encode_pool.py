"""Order and ids do not depend on processes; a text that cannot be encoded is named; a killed process is told."""

import os
import signal

import numpy as np
import pytest

from sieve.data import encode_pool
from sieve.data.encode_pool import EncodePool
from sieve.data.hub_tokenizer import HubTokenizer
from sieve.data.tokenizer import as_documents
from sieve.data.tokenizer_export import save


def batches(texts, size=2):
    for i in range(0, len(texts), size):
        yield i, [f"a#{j}" for j in range(i, i + len(texts[i : i + size]))], texts[i : i + size]
    yield "end", [], []


@pytest.mark.parametrize("processes", [1, 3])
def test_order_and_ids(tokenizer, texts, processes):
    with EncodePool(tokenizer, processes) as pool:
        found = list(pool.encode(batches(texts)))
    assert [tag for tag, _ in found] == [*range(0, len(texts), 2), "end"]
    documents = [ids for _, documents in found for ids in documents]
    for ids, expected in zip(documents, as_documents(tokenizer, texts), strict=True):
        assert np.array_equal(ids, expected) and ids.dtype == np.uint16
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id


def test_tokenizers_of_hugging_face_travel_too(tokenizer, texts, tmp_path):
    save(tokenizer, tmp_path)
    with EncodePool(HubTokenizer.load(str(tmp_path)), 2) as pool:
        (_, documents), _ = pool.encode(batches(texts[:2]))
    assert [tokenizer.decode(ids) for ids in documents] == texts[:2]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_text_that_cannot_be_encoded_is_named(tokenizer, processes):
    with pytest.raises(ValueError, match="a#3 cannot be tokenized: UnicodeEncodeError"):
        with EncodePool(tokenizer, processes) as pool:
            list(pool.encode(batches(["good", "good", "good", "\ud800"])))


@pytest.mark.parametrize("again", range(3))
def test_a_killed_process_is_told(tokenizer, texts, again):
    """And the others end: which locks the killed one held is a matter of luck."""
    with pytest.raises(ValueError, match="a tokenizing process was killed.*the same command goes on"):
        with EncodePool(tokenizer, 2) as pool:
            reading = pool.encode(batches(texts * 50))
            next(reading)
            processes, manager = list(pool._pool._processes.values()), pool._pool._executor_manager_thread
            os.kill(processes[0].pid, signal.SIGKILL)
            list(reading)
    manager.join(10)
    assert not manager.is_alive() and not any(process.is_alive() for process in processes)


def test_reading_stays_close_to_encoding(tokenizer, texts):
    """A source of terabytes must not be read into memory ahead of the tokenizer."""
    taken = 0

    def counted():
        nonlocal taken
        for batch in batches(texts * 20):
            taken += 1
            yield batch

    with EncodePool(tokenizer, 2) as pool:
        for done, _ in enumerate(pool.encode(counted()), 1):
            assert taken - done <= encode_pool.AHEAD * 2
