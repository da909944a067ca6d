"""Shards depend on text, tokenizer and shard size alone: not on processes, stops, kills, or where the text lies."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import numpy as np
import pytest

from sieve.data import remote, shard_job
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.prepare import build_stores
from sieve.data.shard_job import prepare_shards


@pytest.fixture
def corpus(tmp_path, texts):
    """Two files of JSON lines, a few of them broken, of documents of very different length."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "ab":
        records = [json.dumps({"text": text * (1 + 7 * (i % 5 == 0)) + name}) for i, text in enumerate(texts * 6)]
        records[5] = records[17] = '{"text": broken'
        (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    return folder


@pytest.fixture
def model(tmp_path, tokenizer):
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    return TokenizerConfig(path=str(tmp_path / "t.model"))


@pytest.fixture
def data(tmp_path, corpus):
    return DataConfig(type="files", paths=str(corpus), validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def prepared(data, model, out, **changed):
    settings = dict(shard_tokens=20_000, processes=1, save_every=60.0)
    return prepare_shards(data, model, out, **{**settings, **changed})


def contents(folder):
    """Every file of a folder by its name; only a finished one has no journal."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def undisturbed(data, model, tmp_path):
    outcome = prepared(data, model, tmp_path / "undisturbed")
    assert outcome.finished
    return contents(tmp_path / "undisturbed")


def test_shards_are_the_stores_of_the_same_text(data, model, tmp_path, undisturbed):
    assert sum(name.endswith(".tokens") for name in undisturbed) > 5 and "journal.json" not in undisturbed
    shards = build_stores(DataConfig(type="shards", paths=str(tmp_path / "undisturbed"), cache_dir=data.cache_dir), model)
    direct = build_stores(data, model)
    for part in ("train", "validation"):
        ours, theirs = getattr(shards, part), getattr(direct, part)
        assert ours.num_documents == theirs.num_documents and ours.num_tokens == theirs.num_tokens
        for i in range(ours.num_documents):
            assert np.array_equal(ours.document(i), theirs.document(i))
    manifest = json.loads(undisturbed["manifest.json"])
    assert manifest["skipped"] == ["4 broken and 0 under 1 bytes"]
    assert manifest["parts"]["train"]["tokens"] == shards.train.num_tokens


def test_processes_batches_and_saves_do_not_show(data, model, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(shard_job, "BATCH_CHARS", 5000)
    prepared(data, model, tmp_path / "three", processes=3, save_every=0.0)
    assert contents(tmp_path / "three") == undisturbed


def test_stops_do_not_show(data, model, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(shard_job, "BATCH_CHARS", 5000)
    draw, starts = random.Random(0), 0
    while True:
        left = draw.randrange(6)

        def stop():
            nonlocal left
            left -= 1
            return left < 0

        starts += 1
        outcome = prepared(data, model, tmp_path / "stopped", stop=stop)
        if outcome.finished:
            break
    assert starts > 5 and contents(tmp_path / "stopped") == undisturbed


def test_validation_of_its_own(data, model, tmp_path, corpus, texts):
    (corpus.parent / "held.txt").write_text(texts[0])
    outcome = prepared(data.model_copy(update={"validation_paths": (str(corpus.parent / "held.txt"),)}), model, tmp_path / "o")
    assert outcome.manifest["parts"]["validation"]["documents"] == 1 and len(outcome.manifest["skipped"]) == 2


def test_a_finished_folder_is_left_alone(data, model, tmp_path, undisturbed):
    again = prepared(data, model, tmp_path / "undisturbed")
    assert again.finished and again.tokens == 0 and contents(tmp_path / "undisturbed") == undisturbed


@pytest.mark.parametrize("change, said", [
    (dict(shard_tokens=5), "shard_tokens 20000 instead of 5"), (dict(fraction=0.5), "split "),
    (dict(text=True), r"source \(bytes [0-9]+ instead of [0-9]+\);"),
    (dict(data={"min_bytes": 9, "max_bytes": 10**8}), "source .data.max_bytes None instead of 100000000, data.min_b.* 9.;"),
])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(data, model, tmp_path, corpus, change, said, finished):
    prepared(data, model, tmp_path / "out", stop=lambda: not finished)
    if "fraction" in change:
        data = data.model_copy(update={"validation_fraction": 0.5})
    data = data.model_copy(update=change.get("data", {}))
    if "text" in change:
        (corpus / "b.jsonl").write_text('{"text": "other"}\n' * 9)
    with pytest.raises(ValueError, match=f"out was made with other settings: {said}.*give another out="):
        prepared(data, model, tmp_path / "out", **{k: v for k, v in change.items() if k == "shard_tokens"})


def test_other_folders_are_refused(data, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="mine holds other files, as thesis.tex"):
        prepared(data, model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(ValueError, match="cannot be written"):
        prepared(data, model, tmp_path / "mine" / "thesis.tex" / "out")


def test_two_at_once_are_refused(data, model, tmp_path):
    with shard_job._alone(tmp_path / "out"):
        with pytest.raises(ValueError, match="is being prepared by another process"):
            prepared(data, model, tmp_path / "out")


def test_too_many_broken_documents_keep_what_is_done(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_job, "BATCH_CHARS", 5000)
    with pytest.raises(ValueError, match=r"b.jsonl, line 18: not JSON.*broken document 4 and data.max_broken=3"):
        prepared(data.model_copy(update={"max_broken": 3}), model, tmp_path / "out")
    journal = json.loads((tmp_path / "out" / "journal.json").read_text())
    assert journal["cursor"]["file"] == 1 and journal["parts"]["train"]["open"]["documents"] > 0
    assert prepared(data, model, tmp_path / "out").finished


def test_a_full_disk_is_told_and_got_over(data, model, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(shard_job, "BATCH_CHARS", 5000)
    real, left = shard_job.ShardWriter._write, iter(range(60))

    def write(self, which, content):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, which, content)

    monkeypatch.setattr(shard_job.ShardWriter, "_write", write)
    with pytest.raises(ValueError, match="out: No space left on device; .* are free in .*; what is saved stays: make room"):
        prepared(data, model, tmp_path / "out", save_every=0.0)
    monkeypatch.setattr(shard_job.ShardWriter, "_write", real)
    assert json.loads((tmp_path / "out" / "journal.json").read_text())["parts"]["train"]["open"]["documents"] > 0
    (tmp_path / "out" / ".journal.json.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="out/journal.json: No space left on device; .*the same command goes on"):
        prepared(data, model, tmp_path / "out")
    (tmp_path / "out" / ".journal.json.tmp").unlink()
    prepared(data, model, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed


def test_no_validation_text_says_so(data, model, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="there is no validation document in .*data.validation_fraction"):
        prepared(data.model_copy(update={"paths": (str(tmp_path / "one.jsonl"),)}), model, tmp_path / "out")


def test_tokens_are_no_text(data, model, tmp_path):
    with pytest.raises(ValueError, match="data.type=shards holds tokens, not text"):
        prepared(DataConfig(type="shards", paths="x", cache_dir=data.cache_dir), model, tmp_path / "out")


PROGRAM = textwrap.dedent("""
    import json, os, signal, sys, threading
    from pathlib import Path
    from sieve.data import shard_job
    from sieve.data.config import DataConfig, TokenizerConfig
    from sieve.data.shard_writer import ShardWriter

    if __name__ == "__main__":
        settings, model, out, processes, delay = json.loads(sys.argv[1])
        shard_job.BATCH_CHARS = 5000
        real = ShardWriter.add
        def add(self, documents):
            if delay is not None and not add.armed:
                add.armed = True
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            real(self, documents)
        add.armed = False
        ShardWriter.add = add
        outcome = shard_job.prepare_shards(
            DataConfig(**settings), TokenizerConfig(path=model), Path(out), shard_tokens=20_000, processes=processes,
            save_every=0.01)
        print("finished", outcome.finished)
""")


def killed_until_finished(data, model, out, processes, delays):
    """Starts, kills `delays` seconds after the first document, and starts again; returns how often it was killed, and
    the tokens that the journal held each time."""
    kills, saved = 0, []
    for delay in [*delays, None]:
        arguments = json.dumps([data.model_dump(), model.path, str(out), processes, delay])
        done = subprocess.run([sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        if not (out / "journal.json").exists():  # killed between its last work and its end
            continue
        journal = json.loads((out / "journal.json").read_text())
        saved.append(sum(s["open"]["tokens"] + sum(x["tokens"] for x in s["shards"]) for s in journal["parts"].values()))
    assert done.returncode == 0, done.stderr
    return kills, saved


def test_kills_at_random_times_do_not_show(data, model, tmp_path, undisturbed):
    draw = random.Random()
    kills, saved = killed_until_finished(data, model, tmp_path / "killed", 1, [draw.uniform(0.0, 0.08) for _ in range(4)])
    assert kills >= 2 and saved[-1] > 0, "the kills came too late to test anything"
    assert contents(tmp_path / "killed") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_many_kills_at_random_times_do_not_show(data, model, tmp_path, undisturbed, processes):
    draw, total = random.Random(), 0
    for round in range(6):
        out = tmp_path / f"killed-{round}"
        kills, _ = killed_until_finished(data, model, out, processes, [draw.uniform(0.0, 0.05) for _ in range(8)])
        total += kills
        assert contents(out) == undisturbed
    assert total >= 20


def test_worker_processes_end_with_a_killed_parent(data, model, tmp_path):
    arguments = json.dumps([data.model_dump(), model.path, str(tmp_path / "out"), 2, 0.0])
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, arguments], start_new_session=True)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    waiting = threading.Event()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        waiting.wait(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("processes were left behind")


def test_text_over_a_failing_network_gives_the_same_shards(data, model, tmp_path, corpus, undisturbed, servers, monkeypatch):
    """Faults of every kind, stops between batches, and at last the same bytes."""
    for name, value in (("FIRST_BLOCK", 2000), ("LARGEST_BLOCK", 20_000), ("FIRST_PAUSE", 0.001)):
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setattr(shard_job, "BATCH_CHARS", 20_000)
    faults = ["", *["503", "reset", "", "truncated", "short", "", "429", ""] * 8]
    with servers.Server(servers.FlakyHandler, folder=corpus, faults=faults, seen=Counter()) as server:
        urls = tuple(f"{server.url}/{name}.jsonl" for name in "ab")
        finished, stops = False, 0
        while not finished:
            left = iter(range(5))
            outcome = prepared(
                data.model_copy(update={"paths": urls}), model, tmp_path / "http",
                stop=lambda left=left: next(left, None) is None)
            finished, stops = outcome.finished, stops + 1
        seen = server._server.RequestHandlerClass.seen
    assert stops > 3 and all(seen[kind] >= 4 for kind in ("503", "reset", "truncated", "short", "429")), seen
    found = contents(tmp_path / "http")
    assert found.keys() == undisturbed.keys()
    for name in undisturbed.keys() - {"manifest.json"}:  # which names the files
        assert found[name] == undisturbed[name]
    assert json.loads(found["manifest.json"])["parts"] == json.loads(undisturbed["manifest.json"])["parts"]
