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
