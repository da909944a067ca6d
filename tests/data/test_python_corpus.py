"""The corpus of Python sources depends on paths and contents alone, and survives what site-packages may hold."""

import os
from collections import Counter
from contextlib import contextmanager

import pytest

from sieve.data import python_corpus
from sieve.data.python_corpus import PythonSource, interpreter_roots


def code(name, size=600):
    return f"# {name}\n" + "value = 1\n" * (size // 10)


@pytest.fixture
def roots(tmp_path):
    for root, names in (("std", ["a.py", "pkg/b.py", "pkg/deep/c.py"]), ("site", [f"lib/m{i}.py" for i in range(12)])):
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code(name))
    return {"std": str(tmp_path / "std"), "site": str(tmp_path / "site")}


def ids(roots, min_bytes=256, max_bytes=None):
    return [d.id for d in PythonSource(roots=roots, min_bytes=min_bytes, max_bytes=max_bytes)]


def test_every_file_once_in_scattered_order(roots):
    found = ids(roots)
    assert Counter(found) == Counter(["std/a.py", "std/pkg/b.py", "std/pkg/deep/c.py",
                                      *(f"site/lib/m{i}.py" for i in range(12))])
    assert found != sorted(found)
    assert [d.index for d in PythonSource(roots=roots, min_bytes=1, max_bytes=None)] == list(range(15))


def test_order_ignores_time_place_and_byproducts(roots, tmp_path):
    before = ids(roots)
    for i, root in enumerate(roots.values()):
        for folder, _, files in os.walk(root):
            for name in files:
                os.utime(os.path.join(folder, name), (i + 7, i + 7))
    cache = tmp_path / "std" / "pkg" / "__pycache__"
    cache.mkdir()
    (cache / "b.cpython-311.pyc").write_bytes(b"x" * 500)
    (cache / "odd.py").write_text(code("odd"))
    (tmp_path / "std" / "pkg" / "notes.txt").write_text(code("text"))
    assert ids(roots) == before
    moved = {label: root.replace("/std", "/moved") for label, root in roots.items()}
    os.rename(roots["std"], moved["std"])
    assert ids(moved) == before


def test_this_project_hidden_folders_and_nested_packages_are_left_out(roots, tmp_path):
    before = ids(roots)
    for name in ("site/sieve/train/x.py", "site/__editable___sieve_lm_finder.py", "site/.git/x.py", "site/sieve_lm.py",
                 "std/site-packages/x.py", "std/dist-packages/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code(name))
    assert ids(roots) == before


def test_small_repeated_and_undecodable_files_are_left_out(roots, tmp_path):
    before = ids(roots)
    (tmp_path / "std" / "tiny.py").write_text("x = 1\n")
    (tmp_path / "std" / "latin.py").write_bytes(code("latin").encode() + "é".encode("latin-1"))
    assert ids(roots) == before
    (tmp_path / "std" / "pkg" / "again.py").write_text(code("a.py"))
    source = PythonSource(roots=roots, min_bytes=256, max_bytes=None)
    assert len(list(source)) == len(before) and source.skipped() == "1 repeated and 1 not in UTF-8"


def test_loops_of_links_end(roots, tmp_path):
    before = ids(roots)
    (tmp_path / "std" / "pkg" / "loop").symlink_to(tmp_path / "std")
    (tmp_path / "std" / "pkg" / "broken.py").symlink_to(tmp_path / "nowhere.py")
    assert ids(roots) == before


def test_listing_order_does_not_matter(roots, tmp_path, monkeypatch):
    (tmp_path / "site" / "alias").symlink_to(tmp_path / "site" / "lib")  # which of the two names counts?
    before = ids(roots)
    real = os.scandir

    @contextmanager
    def backwards(folder):
        with real(folder) as listing:
            yield sorted(listing, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(python_corpus.os, "scandir", backwards)
    assert ids(roots) == before and "site/alias/m0.py" in before


def test_linked_packages_are_read(roots, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "z.py").write_text(code("z"))
    (tmp_path / "site" / "linked").symlink_to(store)
    assert "site/linked/z.py" in ids(roots)


def test_same_folder_under_two_labels_counts_once(roots):
    assert ids({**roots, "platform": roots["site"]}) == ids(roots)


def test_cap_is_a_prefix(roots):
    found = ids(roots, max_bytes=2000)
    assert found == ids(roots)[: len(found)] and 3 <= len(found) <= 5
    source = PythonSource(roots=roots, min_bytes=1, max_bytes=None)
    assert [d.id for d in source.sample(2000)] == found


def test_fingerprint_follows_files(roots, tmp_path):
    def fingerprint(**settings):
        return PythonSource(roots=roots, **{"min_bytes": 1, "max_bytes": None, **settings}).fingerprint()

    before = fingerprint()
    assert fingerprint() == before != fingerprint(max_bytes=5)
    (tmp_path / "std" / "a.py").write_text(code("a.py") + "more\n")
    assert fingerprint() != before


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no .py file in .*; this Python comes without its sources"):
        PythonSource(roots={"std": str(tmp_path / "absent")}, min_bytes=1, max_bytes=None)


def test_real_interpreter_twice_the_same():
    def read():
        return [(d.id, d.text) for d in PythonSource(min_bytes=256, max_bytes=300_000)]

    first = read()
    assert first == read()
    assert 300_000 <= sum(len(text.encode()) for _, text in first) < 3_000_000
    assert not any("/sieve/" in name or "__pycache__" in name for name, _ in first)
    assert set(interpreter_roots()) == {"stdlib", "packages", "platform-packages"}
