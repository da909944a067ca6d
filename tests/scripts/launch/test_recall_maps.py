"""The script that trains twins and draws their needle maps, whole but at toy sizes on the CPU."""

import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

SCRIPT = Path(__file__).parents[3] / "scripts" / "launch" / "recall_maps.sh"
TOY = (
    "device=cpu dtype=fp32 seq_len=256 tokens=8192 tokenizer.vocab_size=512 model.num_layers=1 model.hidden_size=32 "
    "model.num_heads=2 model.num_kv_heads=1 model.head_dim_qk=16 model.head_dim_v=16 model.intermediate_size=48 "
    "attention.window_size=64 attention.topk=4 schedule.warmup=2 log.every=2 eval.rows=4 eval.every=4 "
    "data.sources.recall.upsample={0:1,128:0} data.phases=[{from_tokens:4096,upsample:{}}]"
).split()
ENVIRONMENT = {
    "DOCUMENTS": "200", "CHARS": "150-500", "FACTS": "4", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    "NEEDLE": "needle.lengths=[128,256] needle.depths=[0,1] needle.samples=1 batch_tokens=512",
}


@pytest.fixture
def books(tmp_path):
    """A folder as SIEVE_BOOKS names it: invented words, four documents a file."""
    folder = tmp_path / "books"
    folder.mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 7))) for _ in range(500)]
    for name in ("books-train-000", "books-valid"):
        lines = "".join(json.dumps({"text": " ".join(rng.choices(words, k=3000))}) + "\n" for _ in range(4))
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return folder


def start(tmp_path, books, *overrides, **changes):
    environment = os.environ | ENVIRONMENT | {"SIEVE_BOOKS": str(books), "XDG_CACHE_HOME": str(tmp_path / "cache")} | changes
    return subprocess.run(
        [str(SCRIPT), "keep", *TOY, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_the_whole_of_it(tmp_path, books):
    done = start(tmp_path, books)
    assert done.returncode == 0, done.stdout + done.stderr
    keep = tmp_path / "keep"
    assert {path.name for path in keep.iterdir()} == {
        "maps.png", "full.json", "nsa.json", "comparison.png", "comparison.json", "runs.tar.gz", "log.txt",
    }
    for kind in ("full", "nsa"):
        results = json.loads((keep / f"{kind}.json").read_text())
        assert results["about"]["checkpoint"] == f"recall-{kind}"
        for task in ("needle", "multikey", "passkey"):
            rows = results["tasks"][task]["tables"][task]
            assert [(row["length"], row["depth"]) for row in rows] == [(n, d) for n in (128, 256) for d in (0, 1)]
    assert json.loads((keep / "comparison.json").read_text())["same_tokens"] is True
    with tarfile.open(keep / "runs.tar.gz") as kept:
        names = {name.removeprefix("runs/recall-") for name in kept.getnames()}
    assert {"full/metrics.jsonl", "nsa/metrics.jsonl", "full/config.yaml", "nsa/report/health/health.png"} <= names
    assert "train nsa: exit code 0" in (keep / "log.txt").read_text()


@pytest.mark.slow
def test_a_stage_that_fails_leaves_what_there_is(tmp_path, books):
    """Its code is 1, it says what failed, and the other stages have run."""
    done = start(tmp_path, books, NEEDLE="needle.lengths=[8] needle.samples=1")
    assert done.returncode == 1 and "failed: eval full: exit code 2" in done.stdout and "is too short" in done.stdout
    kept = {path.name for path in (tmp_path / "keep").iterdir()}
    assert kept == {"maps.png", "comparison.png", "comparison.json", "runs.tar.gz", "log.txt"}


def test_without_a_folder_it_says_how_it_is_used(tmp_path):
    for arguments in ([], ["steps=3"]):
        done = subprocess.run([str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "scripts/launch/recall_maps.sh KEEP" in done.stdout and not [*tmp_path.iterdir()]
