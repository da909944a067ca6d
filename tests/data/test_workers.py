"""Processes that read ahead: their errors, the signals they outlive, their end; and what a state weighs."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice

import pytest

from sieve.data.loader import RowLoader
from sieve.data.phases import Phase
from sieve.data.rows import ReadError

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


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def children():
    own = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    return set(map(int, open(own).read().split()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_group_do_not_end_workers(plain, number):
    before = children()
    loader = RowLoader({"text": plain.ListTokens([30] * 20)}, PHASES, workers=2)
    next(loader)
    workers = children() - before
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, number)
    time.sleep(0.3)
    steps = list(islice(loader, 20))
    assert len(steps) == 20 and all(map(alive, workers))
    loader.close()
    assert wait_until(lambda: not any(map(alive, workers))), "close() leaves workers behind"


def test_a_killed_worker_is_an_error_and_no_hang(plain):
    before = children()
    loader = RowLoader({"text": plain.ListTokens([30] * 20)}, PHASES, workers=2)
    next(loader)
    os.kill(min(children() - before), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker.*killed|exited unexpectedly"):
        list(islice(loader, 200))
    loader.close()


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    script = textwrap.dedent("""
        import importlib.util, os, time
        spec = importlib.util.spec_from_file_location("plain", PLAIN)
        plain = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(plain)
        from sieve.data.loader import RowLoader
        from sieve.data.phases import Phase
        loader = RowLoader({"text": plain.ListTokens([30] * 20)}, [Phase(0, 16, 4, 2)], workers=2)
        next(loader)
        print(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read(), flush=True)
        time.sleep(60)
    """).replace("PLAIN", repr(os.path.join(os.path.dirname(__file__), "plain.py")))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = list(map(int, process.stdout.readline().split()))
    assert len(workers) >= 2 and all(map(alive, workers))
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(map(alive, workers)), 2)


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
