"""A disk that is full, of which there really is too little, and one that may not be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In user and mount namespaces of its own: a file system of 1 MB for the checkpoints, most of it taken by a file that goes
# away when three saves have failed.
SCRIPT = """
import sys
from pathlib import Path
from sieve.train.callbacks.checkpoint import Checkpoint
from sieve.train.run import main
folder, filler = Path(sys.argv[1]), Path(sys.argv[1]) / "filler"
filler.write_bytes(bytes(750_000))
original, failed = Checkpoint._ended, []
def ended(self, run, done):
    original(self, run, done)
    if done is not None and done.path is None:
        failed.append(done.step)
        if len(failed) == 3:
            filler.unlink()
Checkpoint._ended = ended
code = main(sys.argv[2:])
print("failed", failed, "there", sorted(p.name for p in folder.iterdir()))
sys.exit(code)
"""


def has_namespaces() -> bool:
    return subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True).returncode == 0


@pytest.fixture
def settings(tiny_text, tmp_path) -> list[str]:
    return [*tiny_text, "attention=full", "checkpoint.every=1", "checkpoint.keep=1", f"runs_dir={tmp_path}", "name=run"]


@pytest.mark.skipif(not has_namespaces(), reason="needs user namespaces, to mount a small file system")
def test_a_full_disk_is_survived(settings, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    inside = f'mount -t tmpfs -o size=1000k tmpfs "{folder}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", inside, "bash", sys.executable, "-c", SCRIPT,
         str(folder), *settings, "steps=9", "checkpoint.background=false"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written: No space left on device (rank 0); " in done.stderr and "are free in" in done.stderr
    assert "failed [1, 2, 3] there ['step-00000009']" in done.stdout


@pytest.mark.slow
def test_a_folder_that_may_not_be_written(settings, tmp_path):
    """As root everything may be written, so the checkpoints' place is taken by a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "sieve.train", *settings, "steps=2"], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the checkpoint of step 1 could not be written: " in done.stderr
    assert "the state of step 2 could not be saved: " in done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert Path(tmp_path / "run" / "checkpoints").read_text() == ""


@pytest.mark.slow
def test_a_disk_that_fails_one_of_two_ranks_fails_the_save_of_both_and_nothing_else(trainer):
    """Full, read-only, full at the commit, and slow, each once and on one rank; then it is made up for."""
    settings = ["steps=8", "micro_batch=1", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.patience=3", "zero=2"]
    assert trainer.run("whole", *settings, ranks=2)[0] == 0
    code, error = trainer.run("run", *settings, ranks=2, faults=[
        {"at": "save", "step": 2, "rank": 1, "do": "ENOSPC"}, {"at": "save", "step": 4, "rank": 1, "do": "EROFS"},
        {"at": "commit", "step": 5, "rank": 0, "do": "ENOSPC"}, {"at": "save", "step": 6, "rank": 1, "do": "wait", "arg": 8},
    ])
    assert code == 0 and trainer.rows("run") == trainer.rows("whole"), error
    assert "of step 2 could not be written: No space left on device (rank 1)" in error
    assert "of step 4 could not be written: Read-only file system (rank 1)" in error
    assert "of step 5 could not be written: No space left on device (rank 0)" in error
    assert error.count("could not be written") == 3 and "no checkpoint is made of step 7" in error
    assert trainer.steps("run") == [6, 8] and not list((trainer.folder / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_the_last_good_checkpoint_stays_while_one_ranks_disk_fails(trainer):
    settings = ["steps=8", "micro_batch=1", "checkpoint.every=1", "checkpoint.keep=1", "zero=1"]
    assert trainer.run("whole", *settings, ranks=2)[0] == 0
    failing = [{"at": "save", "step": step, "rank": 1, "do": "ENOSPC"} for step in (3, 4, 5, 6)]
    code, error = trainer.run("run", *settings, ranks=2, faults=[*failing, {"at": "step", "step": 7, "do": "SIGKILL"}])
    assert code != 0 and error.count("No space left on device (rank 1)") >= 3 and trainer.steps("run") == [2]
    code, error = trainer.run("run", *settings, ranks=2, faults=[
        {"at": "save", "step": step, "rank": 1, "do": "ENOSPC"} for step in range(3, 9)
    ])
    assert code == 1 and "the state of step 8 could not be saved: No space left on device (rank 1)" in error
    assert error.count("the state of step 8 could not be saved") == 1 and trainer.steps("run") == [2]
    assert trainer.run("run", *settings, ranks=2)[0] == 0
    assert trainer.rows("run") == trainer.rows("whole") and trainer.steps("run") == [8]
