"""results.json on a disk that takes no more."""

import pytest

from sieve.eval.results import read_results, write_results
from sieve.eval.runner import Result


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    write_results([Result("loss", {}, {"eval/loss": 1.0})], tmp_path, {})
    (tmp_path / "results.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_results([Result("mqar", {}, {"eval/mqar": 1.0})], tmp_path, {})
    assert caught.value.filename == str(tmp_path / "results.json")
    assert list(read_results(tmp_path)) == ["loss"]
