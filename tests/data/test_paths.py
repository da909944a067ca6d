"""Which files a setting means, in which order, and what the errors say is there instead."""

import pytest

from sieve.data.files import LocalFile, format_of
from sieve.data.paths import expand


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.txt", "deep/er/d.py.gz", "image.png", ".hidden.txt", "deep/.git/e.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "texts"


def names(entries, forced=None):
    return [file.name for file in expand(entries, forced, "data.paths")]


@pytest.mark.parametrize("name, kind", [
    ("a.jsonl", "jsonl"), ("a.json", "jsonl"), ("a.ndjson.gz", "jsonl"), ("a.jsonl.zst", "jsonl"), ("a.txt", "text"),
    ("A.TXT", "text"), ("a.b.md.zst", "text"), ("a.parquet", "parquet"), ("a.parquet.gz", None), ("a", None),
    ("a.zst", None), ("a.bin", None),
])
def test_format_by_name(tmp_path, name, kind):
    assert format_of(tmp_path / name) == kind


def test_folder_is_searched_in_order_without_hidden_files(folder):
    assert names([str(folder)]) == ["a.jsonl", "b.jsonl", "c.txt", "d.py.gz"]


def test_entries_keep_their_order_and_globs_are_sorted(folder):
    assert names([str(folder / "deep/c.txt"), str(folder / "*.jsonl")]) == ["c.txt", "a.jsonl", "b.jsonl"]
    assert names([str(folder / "**" / "*.txt")]) == ["c.txt"]


def test_a_file_named_twice_is_read_once(folder):
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    assert names([str(folder / "a.jsonl"), str(folder), str(folder / "link.jsonl")]).count("a.jsonl") == 1
    assert "link.jsonl" not in names([str(folder / "a.jsonl"), str(folder / "link.jsonl")])


def test_brackets_in_a_real_name(folder):
    (folder / "[1].txt").write_text("x")
    assert names([str(folder / "[1].txt")]) == ["[1].txt"]


def test_format_may_be_forced(folder):
    assert expand([str(folder / "image.png")], "text", "data.paths") == [LocalFile(folder / "image.png", "text")]


@pytest.mark.parametrize("entry, said", [
    ("texts/a.jsnl", r"'.*a.jsnl' does not exist; closest in .*texts: a.jsonl"),
    ("texts/*.jsonl.zst", r"matches no file; .*texts"),
    ("texst/*.jsonl", r"matches no file; closest in .*: texts/"),
    ("texts/zzzzzz", r"does not exist; .*texts has a.jsonl, b.jsonl, deep/, image.png"),
    ("texts/image.png", r"of no known format; known are .jsonl, .*data.format=text"),
])
def test_errors_name_what_is_there(folder, entry, said):
    with pytest.raises(ValueError, match=said) as error:
        expand([str(folder.parent / entry)], None, "data.paths")
    assert str(error.value).startswith("data.paths: ")


def test_folder_without_texts(folder):
    for path in (folder / "a.jsonl", folder / "b.jsonl", folder / "deep/c.txt", folder / "deep/er/d.py.gz"):
        path.unlink()
    with pytest.raises(ValueError, match="has 1 of .png; none of a known format"):
        expand([str(folder)], None, "data.paths")


def test_nothing_given():
    with pytest.raises(ValueError, match="data.validation_paths is empty; give files"):
        expand([], None, "data.validation_paths")


@pytest.mark.parametrize("entries", [[""], ["a.txt", " "]])
def test_an_empty_entry_is_not_the_folder_that_one_is_in(entries, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"data.paths=\[.*\] has an empty entry, which would be the folder that one is in"):
        expand(entries, None, "data.paths")
    assert expand(["."], None, "data.paths")
