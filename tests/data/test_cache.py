"""Folders appear whole or not at all, one builder at a time."""

import os
import threading

import pytest

from sieve.data.cache import cache_root, locked, staged


def test_staged_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "thing"
    with staged(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["thing"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with staged(tmp_path / "thing") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_first_of_two_builders_wins(tmp_path):
    target = tmp_path / "thing"
    with staged(target) as slow:
        (slow / "a").write_text("slow")
        with staged(target) as fast:
            (fast / "a").write_text("fast")
    assert (target / "a").read_text() == "fast" and os.listdir(tmp_path) == ["thing"]


def test_lock_sweeps_its_own_left_overs_only(tmp_path):
    for name in ("thing.tmp-1", "thing-train.tmp-x", "other.tmp-2", "thing"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "thing"):
        assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"other.tmp-2", "thing"}


def test_lock_excludes_and_frees(tmp_path, caplog):
    entered = threading.Event()

    def second():
        with locked(tmp_path / "thing"):
            entered.set()

    with locked(tmp_path / "thing"):
        other = threading.Thread(target=second)
        other.start()
        assert not entered.wait(0.3)
    other.join(10)
    assert entered.is_set()


def test_root_from_setting_or_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(None) == tmp_path / "xdg" / "sieve"
    assert cache_root(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root(None) == tmp_path / "home" / ".cache" / "sieve"


def test_unwritable_root_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.cache_dir=.*file/x cannot be written"):
        cache_root(str(tmp_path / "file" / "x"))
