import json
from pathlib import Path

import pytest

from sieve.train.rundir import RunFiles, differences, find_run, flatten, read_metrics


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "m", '{"step": 1, "train/loss": 2.0}\n{"step": 2, "trai')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.0}]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m", '{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m:2 is not a metrics line"):
        read_metrics(path)


def test_lines_of_one_step_are_merged_and_steps_ascend(tmp_path: Path) -> None:
    path = write(tmp_path / "m", '{"step": 2, "a": 1}\n{"step": 1}\n{"step": 2, "a": 5, "b": 2}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "a": 5, "b": 2}]


def test_nan_survives(tmp_path: Path) -> None:
    (row,) = read_metrics(write(tmp_path / "m", json.dumps({"step": 1, "train/loss": float("nan")}) + "\n"))
    assert row["train/loss"] != row["train/loss"]


def test_differences_of_flat_configs() -> None:
    ours = flatten({"a": {"b": 1, "c": (1, 2)}, "d": 1, "e": {}})
    theirs = flatten({"a": {"b": 2, "c": [1, 2]}, "f": None, "d": 1, "e": {}})
    assert differences(ours, theirs) == {"a.b": (1, 2)}


def test_a_mapping_by_number_is_one_value() -> None:
    ours, theirs = flatten({"data": {"upsample": {}}}), flatten({"data": {"upsample": {100: 2.0}}})
    assert differences(ours, theirs) == {"data.upsample": ({}, {100: 2.0})}
    assert not differences(theirs, flatten(json.loads(json.dumps({"data": {"upsample": {100: 2.0}}}))))


def test_a_run_is_found_by_path_and_by_name(make_run, tmp_path: Path) -> None:
    directory = make_run("twin-full")
    assert find_run(directory, tmp_path) == directory
    assert find_run("twin-full", directory.parent) == directory
    assert RunFiles.read(directory).config["data.type"] == "python"


def test_a_wrong_name_suggests_the_right_one(make_run) -> None:
    directory = make_run("twin-full")
    with pytest.raises(ValueError, match="did you mean .*twin-full"):
        find_run("twin-ful", directory.parent)


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        RunFiles.read(tmp_path / "none")
    with pytest.raises(ValueError, match="has no metrics.jsonl"):
        RunFiles.read(tmp_path)
    write(tmp_path / "metrics.jsonl", '{"step": 1, "tokens": 10, "eval/loss": 3.0}\n')
    with pytest.raises(ValueError, match="no training loss"):
        RunFiles.read(tmp_path)
