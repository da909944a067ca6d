"""A full disk is told with the file; /dev/full is one."""

import errno
import os
from pathlib import Path

import pytest
import tokenizers

from sieve.data.cache import staged
from sieve.data.disk import is_refusal, told, writing
from sieve.data.shard_files import write_json


def test_what_is_full_is_named(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "file"):
        Path("/dev/full").write_text("x")
    assert is_refusal(caught.value)
    assert told(caught.value).startswith(f"{tmp_path}/file: No space left on device; ")
    assert told(caught.value).endswith(f" MB are free in {tmp_path}")


def test_the_innermost_name_stays(tmp_path):
    with pytest.raises(OSError) as caught, writing(tmp_path / "outer"), writing(tmp_path / "inner"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "inner")


def test_tokenizers_errors_are_of_the_disk_too(tmp_path):
    with pytest.raises(OSError) as caught, writing(tmp_path):
        tokenizers.Tokenizer(tokenizers.models.BPE({str(i): i for i in range(9)}, [])).save("/dev/full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (OSError(errno.EPIPE, "Broken pipe"), OSError("no number"), ValueError("(os error x)"), KeyError(28)):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error
        assert not isinstance(error, OSError) or error.filename is None and not is_refusal(error)


def test_folders_and_journals_are_named(tmp_path):
    with pytest.raises(OSError) as caught, staged(tmp_path / "made"):
        Path("/dev/full").write_text("x")
    assert caught.value.filename == str(tmp_path / "made") and not os.listdir(tmp_path)
    (tmp_path / ".journal.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_json(tmp_path / "journal.json", {})
    assert caught.value.filename == str(tmp_path / "journal.json")
