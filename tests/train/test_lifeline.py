"""Ranks as threads of one process: who leaves in order, who fails, who vanishes."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch

from sieve.train import lifeline as module
from sieve.train.distributed import Place
from sieve.train.lifeline import Lifeline


@pytest.fixture
def ranks(monkeypatch):
    """Three lifelines that are connected; os._exit is only written down."""
    port: list[int] = []
    arrived = threading.Event()

    def from_rank_0(value):
        if value is not None:
            port.append(value)
            arrived.set()
        arrived.wait(10)
        return port[0]

    monkeypatch.setattr(module, "from_rank_0", from_rank_0)
    monkeypatch.setattr(module, "_GRACE", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    ends: list[int] = []
    monkeypatch.setattr(module.os, "_exit", ends.append)
    lines = [Lifeline(Place(rank, 3, rank, torch.device("cpu"))) for rank in range(3)]
    threads = [threading.Thread(target=line.__enter__) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    lines[0].ends = ends
    yield lines
    for line in lines:
        line._closing = True  # what would still end the process may not do so when os._exit is the real one again
    time.sleep(0.3)


def vanish(line: Lifeline) -> None:
    """As the system does when a process is killed: it says nothing of the others that it sees going, while sockets close."""
    line._closing = True
    for peer in line._peers.values():
        peer.shutdown(socket.SHUT_RDWR)


def test_who_leaves_in_order_is_not_missed(ranks):
    for line in reversed(ranks):
        line.__exit__()
    time.sleep(0.3)
    assert [line.death for line in ranks] == [None] * 3 and ranks[0].ends == []


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_who_vanishes_is_missed_by_all_and_named(ranks, lost):
    vanish(ranks[lost])
    for line in ranks:
        if line.place.rank != lost:
            assert line.blame(5) == f"rank {lost} is gone: it was killed, or crashed without a word"
    until = time.monotonic() + 5
    while len(ranks[0].ends) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert ranks[0].ends == [1, 1]


def test_who_fails_says_why(ranks):
    ranks[2].fail("ValueError: \u00fc" + 3000 * "x")
    for line in ranks[:2]:
        assert line.blame(5).startswith("rank 2 is gone: ValueError: \u00fcxxx")
    assert ranks[2].death is None


def test_one_rank_alone_needs_none():
    with Lifeline(Place(0, 1, 0, torch.device("cpu"))) as line:
        assert line.blame(5) is None
