"""Every format gives the same documents in order; faults are counted, named and bounded."""

import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sieve.data import sources
from sieve.data.config import DataConfig
from sieve.data.sources import source_of

TEXTS = ["first\nof them\n", "zweiter: äöü", "third \t 漢字 😀", "x" * 300]


def source(*paths, **settings):
    return source_of(DataConfig(type="files", paths=[str(p) for p in paths], **settings))


def lines(texts, field="text"):
    records = (json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts))
    return "".join(f"{record}\n" for record in records).encode()


def long_window(data):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def frames(data):
    half = len(data) // 2
    return b"".join(zstandard.compress(part) for part in (data[:half], b"", data[half:]))


def seekable(data):
    skippable = b"\x5e\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    return skippable + frames(data) + skippable


def table(texts, path, **options):
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)


@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", bytes), ("a.json", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress),
    ("a.ndjson.zst", frames), ("seekable.jsonl.zst", seekable), ("long.jsonl.zst", long_window),
    ("bom.jsonl", lambda d: b"\xef\xbb\xbf" + d),
    ("gaps.jsonl", lambda d: b"\n\n" + d.replace(b"\n", b"\r\n\n").rstrip()),
])
def test_json_lines(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(lines(TEXTS)))
    found = list(source(tmp_path / name))
    assert [d.text for d in found] == TEXTS
    assert [d.index for d in found] == [0, 1, 2, 3]
    assert found[0].id.startswith(f"{name}#line ")


def test_parquet_in_row_groups(tmp_path):
    texts = TEXTS * 50
    table(texts, tmp_path / "a.parquet", row_group_size=7)
    assert [d.text for d in source(tmp_path / "a.parquet")] == texts


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_kinds_of_string(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
    assert [d.text for d in source(tmp_path / "a.parquet")] == TEXTS


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.md.gz", gzip.compress), ("a.py.zst", zstandard.compress)])
def test_text(tmp_path, name, pack):
    text = "  tabs\tand\r\nlines\n\n"
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert [d.text for d in source(tmp_path / name)] == [text]


def test_all_kinds_in_one_folder(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_bytes(lines(["two", "three"]))
    table(["four"], tmp_path / "c.parquet")
    found = source(tmp_path)
    assert [d.text for d in found] == ["one", "two", "three", "four"] == [d.text for d in found]
    assert found.done == 1.0


def test_small_reads_of_a_large_zstd(tmp_path):
    texts = [f"{i} " * 5000 for i in range(60)]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(texts)))
    assert [d.text for d in source(tmp_path / "a.jsonl.zst")] == texts


def test_limits(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["aa", "é", "", "bbbb", "cc", "dd"]))
    assert [d.text for d in source(tmp_path, min_bytes=2)] == ["aa", "é", "bbbb", "cc", "dd"]
    assert [d.text for d in source(tmp_path, min_bytes=3)] == ["bbbb"]
    assert [d.text for d in source(tmp_path, max_bytes=5)] == ["aa", "é", "bbbb"]
    short = source(tmp_path)
    assert "" not in [d.text for d in short] and short.skipped() == "0 broken and 1 under 1 bytes"


BROKEN = [
    b'{"text": "cut', b'{"text": "\xff"}', b'{"other": "x"}', b'{"text": null}', b'{"text": 5}', b'["text"]',
    b'{"text": "\\ud800"}',
]


@pytest.mark.parametrize("bad", BROKEN)
def test_broken_lines_are_skipped_and_named(tmp_path, caplog, bad):
    good = lines(["one", "two"]).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(good[0] + bad + b"\n" + good[1])
    with caplog.at_level(logging.WARNING):
        found = source(tmp_path / "a.jsonl")
        assert [d.text for d in found] == ["one", "two"] == [d.text for d in found]
    assert len(caplog.records) == 1
    assert f"{tmp_path / 'a.jsonl'}, line 2: " in caplog.text and "1 of at most 100" in caplog.text
    assert found.skipped() == "1 broken and 0 under 1 bytes"


def test_too_many_broken_lines_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["good"]) + b"bad\n" * 3)
    assert len(list(source(tmp_path / "a.jsonl", max_broken=3))) == 1
    found = source(tmp_path / "a.jsonl", max_broken=2)
    for _ in range(2):  # counted anew in each pass
        with pytest.raises(ValueError, match="line 4: not JSON.*broken document 3 and data.max_broken=2"):
            list(found)


def test_broken_text_and_parquet(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe bad")
    (tmp_path / "b.txt").write_text("good")
    raw = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff", None], pa.binary()).buffers())
    pq.write_table(pa.table({"text": raw}), tmp_path / "c.parquet")
    assert [d.text for d in source(tmp_path)] == ["good", "ok"]
    assert "row 1: not UTF-8" in caplog.text and "row 2: text is null" in caplog.text
    assert "whole file: not UTF-8 at byte 0" in caplog.text


@pytest.mark.parametrize("name, data", [
    ("a.jsonl.zst", zstandard.compress(lines(TEXTS * 100))[:-9]), ("a.jsonl.zst", b"no zstd at all"),
    ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-12]), ("a.jsonl.gz", b"no gzip"), ("a.parquet", b"PAR1 but no more"),
])
def test_damaged_files_are_errors(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} cannot be read to its end, it is damaged or cut short"):
        list(source(tmp_path / name))


def test_wrong_field_lists_the_fields(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"], field="content"))
    with pytest.raises(ValueError, match=r"data.text_field='text' is not .*a.jsonl.*id \(int\), content \(str\); "
                                         "set data.text_field=content"):
        source(tmp_path / "a.jsonl")
    assert [d.text for d in source(tmp_path / "a.jsonl", text_field="content")] == ["x"]
    table(["x"], tmp_path / "b.parquet")
    for field in ("txt", "id"):
        with pytest.raises(ValueError, match=r"b.parquet; its records have id \(int64\), text \(string\)"):
            source(tmp_path / "b.parquet", text_field=field)


def test_errors_at_start(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="data.paths: all 1 files are empty"):
        source(tmp_path / "empty.txt")
    (tmp_path / "array.json").write_text('[{"text": "x"}]')
    with pytest.raises(ValueError, match="is one JSON array, not JSON lines; `jq"):
        source(tmp_path / "array.json")
    (tmp_path / "prose.jsonl").write_text("just words\n" * 4)
    with pytest.raises(ValueError, match="prose.jsonl: no record can be read; line 1: not JSON.*data.format"):
        source(tmp_path / "prose.jsonl", max_broken=2)


def test_fingerprint_follows_content_not_place_or_time(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    before = source(tmp_path / "a.jsonl").fingerprint()
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "b.jsonl")
    assert source(tmp_path / "moved").fingerprint() == before
    assert source(tmp_path / "moved", min_bytes=2).fingerprint() != before
    (tmp_path / "moved" / "b.jsonl").write_bytes(lines(TEXTS).replace(b"first", b"fjrst"))
    assert source(tmp_path / "moved").fingerprint() != before


def test_fingerprint_of_much_text_reads_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HASHED_TOTAL", 100)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(["x" * 1000] * 400))
    before = source(tmp_path).fingerprint()
    assert source(tmp_path).fingerprint() == before
    (tmp_path / "a.jsonl").touch()
    assert source(tmp_path).fingerprint() != before


def test_sample_takes_from_every_file(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines([name * 1000] * 400))
    found = list(source(tmp_path).sample(300_000))
    per_file = {name: sum(len(d.text) for d in found if d.text[0] == name) for name in "abc"}
    assert all(95_000 < size < 105_000 for size in per_file.values())
    assert [d.id for d in found] == [d.id for d in source(tmp_path).sample(300_000)]


def test_sample_shortens_a_long_document(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 100_000)
    (found,) = source(tmp_path).sample(1001)
    assert found.text == "é" * 500


def test_sample_stays_below_max_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["a" * 10] * 5))
    (tmp_path / "b.jsonl").write_bytes(lines(["b" * 10] * 5))
    assert {d.text[0] for d in source(tmp_path, max_bytes=50).sample(1000)} == {"a"}


def write_all_formats(folder):
    """Five files with broken, short, too large and good records, the last of each file a broken one."""
    bad = [b"not json\n", b'{"text": "\xff"}\n']
    for name, pack in (("a.jsonl", bytes), ("b.jsonl.gz", gzip.compress), ("c.jsonl.zst", zstandard.compress)):
        good = lines([f"{name} {i}" * (1 + i % 5) for i in range(9)] + ["s", "L" * 200]).splitlines(keepends=True)
        (folder / name).write_bytes(pack(b"".join([good[0], bad[0], b"\n", *good[1:6], bad[1], *good[6:], bad[0]])))
    table([f"row {i}" for i in range(11)] + ["s", None], folder / "d.parquet", row_group_size=3)
    (folder / "e.txt").write_text("the last one")


@pytest.mark.parametrize("settings", [{}, {"max_bytes": 700}])
def test_every_cursor_goes_on_as_if_there_had_been_no_stop(tmp_path, settings):
    write_all_formats(tmp_path)
    settings = dict(min_bytes=3, max_document_bytes=150, **settings)
    whole = source(tmp_path, **settings)
    found, cursors = [], [{}]
    for document in whole:
        found.append(document)
        cursors.append(json.loads(json.dumps(whole.cursor)))
    assert len(found) > 20 and (settings.get("max_bytes") or len(found) == 39)
    for i, cursor in enumerate(cursors):
        again = source(tmp_path, **settings)
        assert list(again.after(cursor)) == found[i:]
        assert again.skipped() == whole.skipped() and again.done == pytest.approx(whole.done)


def test_a_cursor_counts_broken_documents_before_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]) + b"bad\n" + lines(["two"]) + b"bad\n" * 2)
    whole = source(tmp_path, max_broken=2)
    reading = iter(whole)
    next(reading), next(reading)
    with pytest.raises(ValueError, match="line 5: .*broken document 3"):
        list(source(tmp_path, max_broken=2).after(whole.cursor))


@pytest.mark.parametrize("name, data, said", [
    ("a.jsonl", lines(["x" * 101]), r"101 bytes, and data.max_document_bytes=100"),
    ("a.jsonl", lines(["x" * 100_000]), r"a line of more than 800 bytes"),
    ("a.txt", b"x" * 101, r"more than 100 bytes, and data.max_document_bytes=100"),
])
def test_documents_over_the_limit_are_broken(tmp_path, caplog, name, data, said):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.jsonl").write_bytes(data * (name == "a.jsonl") + lines(["é" * 50, "after"]))
    assert [d.text for d in source(tmp_path, max_document_bytes=100)] == ["é" * 50, "after"]
    assert said in caplog.text and "skipped" in caplog.text
    with pytest.raises(ValueError, match="broken document 1 and data.max_broken=0|no record can be read; line 1"):
        list(source(tmp_path, max_document_bytes=100, max_broken=0))
