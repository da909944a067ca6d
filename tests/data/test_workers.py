"""Threads that read ahead: their errors, their end, how far they go; and what a state weighs."""

import json
import signal
import threading
import time
from itertools import islice

import pytest

from sieve.data.loader import RowLoader
from sieve.data.phases import Phase
from sieve.data.rows import ReadError
from sieve.train.signals import StopSignal

PHASES = [Phase(0, 16, 4, 2)]


class Faulty:
    """Documents of which one cannot be read."""

    def __init__(self, tokens, bad):
        self.num_documents, self.num_tokens, self.id = tokens.num_documents, tokens.num_tokens, tokens.id
        self.length, self._tokens, self._bad = tokens.length, tokens, bad

    def document(self, index):
        if index == self._bad:
            raise OSError(5, "Input/output error")
        return self._tokens.document(index)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_unreadable_document_is_named(plain, workers):
    sources = {"books": Faulty(plain.ListTokens([30] * 20), 7), "code": plain.ListTokens([9] * 20, 1)}
    loader = RowLoader(sources, [Phase(0, 16, 4, 2, weights={"books": 1, "code": 1})], workers=workers)
    with pytest.raises(ReadError, match=r"source books, document 7, tokens \d+ to \d+ \(epoch 0\): OSError.*Input/output"):
        list(islice(loader, 30))
    loader.close()


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-")]


@pytest.mark.parametrize("workers", [1, 3])
def test_after_an_error_nothing_follows_and_close_ends_the_threads(plain, workers):
    loader = RowLoader({"books": Faulty(plain.ListTokens([30] * 20), 7)}, PHASES, workers=workers)
    with pytest.raises(ReadError):
        list(islice(loader, 30))
    assert list(islice(loader, 3)) == []
    loader.close()
    assert not data_threads()


def test_close_does_not_wait_for_steps_that_nobody_takes(plain):
    loader = RowLoader({"text": plain.ListTokens([30] * 20)}, PHASES, workers=4, prefetch=3)
    next(loader)
    assert len(data_threads()) == 4
    started = time.monotonic()
    loader.close()
    assert not data_threads() and time.monotonic() - started < 5


def test_no_more_is_read_ahead_than_asked_for(plain):
    tokens = plain.ListTokens([64] * 50)  # four rows of 16 a document, one document a step
    loader = RowLoader({"text": tokens}, PHASES, workers=2, prefetch=3)
    next(loader)
    time.sleep(0.3)
    assert tokens.reads <= 4 * (1 + 2 * 3)
    loader.close()


class Slow(Faulty):
    """Documents that come over a network: each takes 5 ms, during which others may be fetched."""

    def document(self, index):
        time.sleep(0.005)
        return self._tokens.document(index)


def test_several_workers_wait_at_the_same_time(plain):
    def seconds(workers):
        loader = RowLoader({"text": Slow(plain.ListTokens([30] * 50), None)}, PHASES, workers=workers)
        started = time.monotonic()
        steps = list(islice(loader, 40))
        taken = time.monotonic() - started
        loader.close()
        return taken, steps[-1].state

    (one, state), (four, same) = seconds(1), seconds(4)
    assert four < 0.6 * one and state == same


def test_the_loop_reads_on_through_signals(plain):
    """A scheduler's SIGTERM, or Ctrl-C, reaches the whole process group; the step at work still gets its data."""
    loader = RowLoader({"text": Slow(plain.ListTokens([30] * 50), None)}, PHASES, workers=2)
    with StopSignal() as stop:
        next(loader)
        signal.raise_signal(signal.SIGTERM)
        steps = list(islice(loader, 10))
        assert stop.requested == "SIGTERM"
    assert len(steps) == 10
    loader.close()


class Million:
    """A million documents that nobody has written: token i of document d is (d + i) % 50000."""

    num_documents, id = 1_000_000, "million"
    reads = 0

    def length(self, index):
        return 8 + index % 40

    num_tokens = sum(8 + index % 40 for index in range(40)) * 25_000

    def document(self, index):
        import numpy as np

        self.reads += 1
        return ((index + np.arange(self.length(index))) % 50_000).astype(np.uint16)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "document"])
def test_a_late_state_is_small_and_found_at_once(packing):
    phases = [Phase(0, 256, 4, 4, packing, {"a": 0.5, "b": 0.5}, {"a": {20: 2.0}})]
    sources = {"a": Million(), "b": Million()}
    loader = RowLoader(sources, phases)
    state = next(loader).state
    for name, bucket in state["buckets"].items():  # as after millions of documents
        bucket["cursor"] = [3, 690_000 if name == "b" else 290_000, 0, 0]
        bucket["given"] = bucket["tokens"] = 10**11
    assert len(json.dumps(state)) < 2_000
    started = time.monotonic()
    later = RowLoader(sources, phases, state=state)
    built = time.monotonic() - started
    before = sum(source.reads for source in sources.values())
    started = time.monotonic()
    step = next(later)
    assert time.monotonic() - started < max(1.0, built)
    read = sum(source.reads for source in sources.values()) - before
    assert read <= 4 * 256 // 8 + 4, "seeking reads documents that are not in the rows"
    assert step.state["buckets"]["b"]["cursor"][0] == 3


def test_reading_a_million_documents_keeps_the_state_small():
    loader = RowLoader({"a": Million()}, [Phase(0, 65_536, 16, 16)])
    sizes = []
    while loader.state["buckets"]["a"]["cursor"][0] == 0:
        sizes.append(len(json.dumps(next(loader).state)))
    assert loader.state["tokens"] >= Million.num_tokens and max(sizes) < 1_000
