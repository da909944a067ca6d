"""Every kind of file of a checkpoint of several ranks, damaged in every way: all ranks pass over it, and say why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WAYS = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_damaged_checkpoints_of_several_ranks(trainer, tmp_path, ranks):
    assert trainer.run("source", "steps=2", "checkpoint.every=1", "eval=none", "micro_batch=1", "zero=3", ranks=ranks)[0] == 0
    source, folder = tmp_path / "source" / "checkpoints", tmp_path / "damaged"
    files = sorted(path.name for path in (source / "step-00000002").iterdir())
    assert len(files) == 2 * ranks + 2
    for file in files:
        for way, damage in WAYS.items():
            shutil.copytree(source, folder / f"{file}-{way}" / "checkpoints")
            damage(folder / f"{file}-{way}" / "checkpoints" / "step-00000002" / file)
    shutil.copytree(source, folder / "sound" / "checkpoints")
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    for resume in ("auto", "2"):
        subprocess.run(
            [*launcher, str(Path(__file__).with_name("find_all.py")), str(folder), resume], check=True, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        )
        found = [json.loads((folder / f"found-{resume}-{rank}.json").read_text()) for rank in range(ranks)]
        assert all(each == found[0] for each in found), "the ranks do not agree"
        assert found[0].pop("sound") == ["step-00000002"]
        assert len(found[0]) == len(files) * len(WAYS)
        for name, (outcome, *said) in found[0].items():
            file = name.rpartition("-")[0]
            if resume == "auto":
                assert outcome == "step-00000001" and len(said) == 1, name
                told = said[0]
                assert told.startswith("passing over ") and "step-00000002: " in told, name
            else:
                told = outcome
                assert told.startswith("ValueError: resume=2: ") and "cannot be resumed from: " in told and not said, name
            # A digit of COMPLETE's that is another now accuses the file that it is of.
            assert file in told or name == "COMPLETE-flipped" and "is damaged" in told, (name, told)
