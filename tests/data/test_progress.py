"""A bar on a terminal; log lines, and no control characters, elsewhere."""

import logging

import pytest

from sieve.data import progress
from sieve.data.progress import Progress


def test_log_lines_without_a_terminal(caplog, capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), Progress("tokenising", terminal=False) as bar:
        bar.update(0.2, 1, 100)
        bar.update(0.5, 1200, 22_000)
        bar.update(0.6, 1300, 23_000)
    assert [r.message for r in caplog.records] == [
        "tokenising: 50 %, 1,200 documents, 22,000 tokens, 2,000 tokens/s",
        "tokenising: 1,300 documents, 23,000 tokens, 1,150 tokens/s in 20.0 s",
    ]
    assert capsys.readouterr().out == ""


def test_bar_on_a_terminal_goes_to_stderr(capsys):
    with Progress("tokenising", terminal=True) as bar:
        bar.update(0.5, 3, 4567)
    out, err = capsys.readouterr()
    assert out == "" and "tokenising" in err and "4,567 tokens" in err


def test_failure_is_not_reported_as_done(caplog):
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError):
        with Progress("tokenising", terminal=False):
            raise RuntimeError
    assert not caplog.records
