"""Text behind http on a network that times out, resets, refuses and cuts bodies short: nothing lost, nothing twice."""

import gzip
import hashlib
import json
import logging
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sieve.data import remote
from sieve.data.config import DataConfig
from sieve.data.remote import Remote, is_transient
from sieve.data.sources import source_of

TEXTS = [f"document {i}: " + "words and numbers 0123456789 " * (i % 37) for i in range(600)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FAULTS = ["503", "reset", "truncated", "short", "stall", "429"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (tmp_path / "a.txt").write_text("one document")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=50)
    return tmp_path


@pytest.fixture
def web(folder, servers, monkeypatch):
    """web(faults, ...) -> a running server; small blocks and short pauses, so that a small file takes many requests."""
    monkeypatch.setattr(remote, "FIRST_BLOCK", 1000)
    monkeypatch.setattr(remote, "LARGEST_BLOCK", 3000)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    running = []

    def start(faults=(), **attributes):
        server = servers.Server(
            servers.FlakyHandler, folder=folder, faults=list(faults), seen=Counter(), stall=0.6, **attributes)
        server.seen = server._server.RequestHandlerClass.seen
        running.append(server.__enter__())
        return server

    yield start
    for server in running:
        server.__exit__()


def source(*urls, **settings):
    return source_of(DataConfig(type="files", paths=urls, timeout=0.3, **settings))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_fault_is_got_over(web, name, caplog):
    faults = ["", *(fault for kind in FAULTS for fault in (kind, "", kind, kind))]
    server = web(faults)
    assert [d.text for d in source(f"{server.url}/{name}")] == TEXTS
    # A small compressed file is read whole before all faults had their turn; then its second reading meets the rest.
    while server._server.RequestHandlerClass.faults:
        assert [d.text for d in source(f"{server.url}/{name}")] == TEXTS
    assert all(server.seen[kind] >= 3 for kind in FAULTS), server.seen
    assert "trying again" in caplog.text and f"{server.url}/{name}" in caplog.text


@pytest.mark.parametrize("options", [{"ranges": False}, {"ranges": False, "sizes": False}])
def test_servers_without_ranges_or_sizes(web, options):
    faults = ["", "truncated", "", "truncated", "truncated"]
    server = web(faults, **options)
    for name in ("a.jsonl", "a.jsonl.zst"):
        assert [d.text for d in source(f"{server.url}/{name}")] == TEXTS
    assert server.seen["truncated"] == 3
    with pytest.raises(ValueError, match="knows no ranges; download it first"):
        source(f"{server.url}/a.parquet")


def test_a_dead_server_is_an_error_in_the_end(web):
    server = web(["503"] * 1000)
    with pytest.raises(ValueError, match=r"reading http://127.0.0.1:\d+/a.jsonl from byte 0 failed 3 times.*503.*data.retries"):
        list(source(f"{server.url}/a.jsonl", retries=2))
    assert server.seen["503"] == 3


def test_what_is_not_there_or_forbidden_is_not_asked_for_again(web):
    server = web()
    with pytest.raises(ValueError, match="data.paths: http.*/b.jsonl does not exist"):
        source(f"{server.url}/b.jsonl")
    with pytest.raises(ValueError, match="data.paths: .*forbidden.jsonl.*403"):
        source(f"{server.url}/forbidden.jsonl")
    assert server.seen["forbidden"] <= 2  # HEAD, then GET: two ways to ask once
    with pytest.raises(ValueError, match="of no known format"):
        source(f"{server.url}/a.bin")


def test_a_busy_server_is_asked_for_the_size_again(web):
    server = web(["503", "503", "", "reset"], head_fails=True)
    assert [d.text for d in source(f"{server.url}/a.jsonl")] == TEXTS
    assert server.seen["503"] == 2


def test_names_with_queries_and_local_files_beside(web, folder):
    server = web()
    found = list(source(f"{server.url}/a.txt?token=1", str(folder / "a.jsonl")))
    assert [d.text for d in found] == ["one document", *TEXTS] and found[0].id == "a.txt#whole file"


def test_a_cursor_goes_on_over_the_network(web):
    server = web(["", "reset", "", "", "truncated"])
    whole = source(f"{server.url}/a.parquet", f"{server.url}/a.jsonl")
    reading = iter(whole)
    head = [next(reading).text for _ in range(700)]
    rest = source(f"{server.url}/a.parquet", f"{server.url}/a.jsonl").after(json.loads(json.dumps(whole.cursor)))
    assert head + [d.text for d in rest] == TEXTS + TEXTS


def test_a_cursor_in_parquet_does_not_fetch_what_is_behind_it(web, folder, monkeypatch):
    texts = [hashlib.sha512(str(i).encode()).hexdigest() * 4 for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), folder / "b.parquet", row_group_size=200, use_dictionary=False)
    server = web()
    monkeypatch.setattr(remote, "LARGEST_BLOCK", 10_000)
    asked = []
    for taken in (0, 1950):
        whole = source(f"{server.url}/b.parquet")
        reading = iter(whole)
        for _ in range(taken):
            next(reading)
        again, before = source(f"{server.url}/b.parquet"), sum(server.seen.values())
        assert [d.text for d in again.after(whole.cursor)] == texts[taken:]
        asked.append(sum(server.seen.values()) - before)
    assert asked[1] < asked[0] / 2


def test_fingerprint_needs_no_reading(web, caplog):
    server = web()
    first = source(f"{server.url}/a.jsonl")
    before = sum(server.seen.values())
    assert first.fingerprint() == source(f"{server.url}/a.jsonl").fingerprint()
    assert first.fingerprint() != source(f"{server.url}/a.jsonl.zst").fingerprint()
    assert sum(server.seen.values()) - before < 10


def test_other_file_systems_by_glob_and_folder():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "image.png"):
        memory.pipe(f"/corpus/{name}", json.dumps({"text": name}).encode())
    try:
        assert [d.text for d in source("memory://corpus/*.jsonl")] == ["a.jsonl", "b.jsonl"]
        assert [d.text for d in source("memory://corpus/")] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
        with pytest.raises(ValueError, match="matches no file of a known format; .*corpus: .*a.jsonl"):
            source("memory://corpus/*.parquet")
        with pytest.raises(ValueError, match="a.jsnl does not exist; closest in .*corpus: a.jsonl"):
            source("memory://corpus/a.jsnl", format="jsonl")
    finally:
        memory.rm("/corpus", recursive=True)


def test_packages_and_protocols_that_are_missing():
    with pytest.raises(ValueError, match="data.paths: nothing://x/a.txt: "):
        source("nothing://x/a.txt")
    with pytest.raises(ValueError, match="needs a package that is not installed: .*adlfs"):
        source("abfs://x/a.txt")


class Told(Exception):
    """An error with an HTTP status, as each library tells it."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize("status, again", [(503, True), (429, True), (404, False), (403, False)])
def test_statuses_as_libraries_tell_them(status, again):
    for attributes in (
        {"status": status}, {"response": SimpleNamespace(status_code=status)},
        {"response": {"ResponseMetadata": {"HTTPStatusCode": status}}},
    ):
        assert is_transient(Told(**attributes)) == again


@pytest.mark.parametrize("error, again", [
    (ConnectionResetError(), True), (TimeoutError(), True), (EOFError(), True), (FileNotFoundError(), False),
    (PermissionError(), False), (TypeError(), False), (KeyError(), False),
])
def test_which_errors_are_the_networks(error, again):
    assert is_transient(error) == again


def test_pauses_grow_to_a_limit(monkeypatch, caplog):
    slept = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)

    def fail():
        raise ConnectionResetError("gone")

    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="failed 11 times"):
        Remote(retries=10).patiently(fail, "reading")
    assert len(slept) == 10 and slept[0] < 1 and all(20 < pause < 40 for pause in slept[-3:])
