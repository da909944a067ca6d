"""Data sets in the Hub's layout: from a local folder, and by name from a server that answers as the Hub does."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from sieve.data.config import DataConfig
from sieve.data.sources import source_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


def parquet(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({field: texts, "id": [str(i) for i in range(len(texts))]}), path)


def lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text, "meta": {"set": "x"}}) + "\n" for text in texts).encode()
    path.write_bytes(zstandard.compress(data))


@pytest.fixture
def splits(tmp_path):
    """As pg19: files named by split and number."""
    for i in range(2):
        parquet(tmp_path / "set" / "data" / f"train-0000{i}-of-00002.parquet", [f"train {i} {j}" for j in range(3)])
    parquet(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", ["held out"])
    return tmp_path / "set"


@pytest.fixture
def card(tmp_path):
    """As fineweb-edu: a card that names the files of each subset."""
    parquet(tmp_path / "set" / "sample" / "10BT" / "000_00000.parquet", ["small"])
    parquet(tmp_path / "set" / "data" / "CC-1" / "000_00000.parquet", ["large 1"])
    parquet(tmp_path / "set" / "data" / "CC-2" / "000_00000.parquet", ["large 2"])
    front = yaml.safe_dump({"configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
    ]})
    (tmp_path / "set" / "README.md").write_text(f"---\n{front}---\n# Set\n")
    return tmp_path / "set"


def texts(repo, validation=False, **settings):
    return [d.text for d in source_of(DataConfig(type="hub", repo=str(repo), **settings), validation=validation)]


def test_splits_by_name(splits):
    assert texts(splits) == [f"train {i} {j}" for i in range(2) for j in range(3)]
    assert texts(splits, validation=True, validation_split="validation") == ["held out"]
    assert texts(splits, split="validation") == ["held out"]


def test_subsets_of_the_card(card):
    assert texts(card) == ["large 1", "large 2"]
    assert texts(card, subset="sample-10BT") == ["small"]


def test_folders_named_by_split(tmp_path):
    """As slimpajama: train/chunkN/*.jsonl.zst."""
    for split in ("train", "validation"):
        for chunk in (1, 2):
            lines(tmp_path / split / f"chunk{chunk}" / f"example_{split}_0.jsonl.zst", [f"{split} {chunk}"])
    assert texts(tmp_path) == ["train 1", "train 2"]
    assert texts(tmp_path, validation=True, validation_split="validation") == ["validation 1", "validation 2"]


def test_a_folder_of_the_data_set_and_its_field(tmp_path):
    """As the-stack: data/LANGUAGE, the text in `content`."""
    for language in ("python", "rust"):
        parquet(tmp_path / "data" / language / "data-00000-of-00001.parquet", [f"code in {language}"], "content")
    assert texts(tmp_path, data_dir="data/rust", text_field="content") == ["code in rust"]


def test_mistakes_name_what_is_there(splits, card, tmp_path):
    with pytest.raises(ValueError, match=r"data.split=test: no such split in data.repo=.*; there are train"):
        texts(splits, split="test")
    with pytest.raises(ValueError, match="data.validation_split=dev: no such split"):
        texts(splits, validation=True, validation_split="dev")
    with pytest.raises(ValueError, match=r"data.subset=10BT: .*'sample-10BT'"):
        texts(card, subset="10BT")
    with pytest.raises(ValueError, match=r"data.text_field='content' is not a text in .*text \(string\)"):
        texts(splits, text_field="content")
    with pytest.raises(ValueError, match="data.repo=.*nothing: "):
        texts(tmp_path / "nothing")
    with pytest.raises(ValueError, match="data.type=hub reads data.repo; give a data set"):
        source_of(DataConfig(type="hub"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.webp").write_bytes(b"x")
    with pytest.raises(ValueError, match="data.repo=.*images"):
        texts(tmp_path / "images")


@pytest.mark.parametrize("name", ["fineweb-edu", "pg19", "slimpajama", "the-stack"])
def test_shipped_data_sets_are_of_the_hub(name):
    config = DataConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert config.type == "hub" and config.repo.count("/") == 1 and config.name == name


PROGRAM = textwrap.dedent("""
    import json, sys
    from sieve.data import remote
    from sieve.data.config import DataConfig
    from sieve.data.sources import source_of
    remote.FIRST_PAUSE = 0.01
    def said(**settings):
        try:
            source = source_of(DataConfig(type="hub", **settings))
            return [d.text for d in source], [f.location for f in source.files], source.fingerprint()
        except ValueError as error:
            return str(error)
    print(json.dumps([said(**settings) for settings in json.loads(sys.argv[1])]))
""")


def test_by_name_from_a_hub(splits, servers, tmp_path):
    asked = [dict(repo="owner/books"), dict(repo="owner/none"), dict(repo="owner/books", split="tset"),
             dict(repo="owner/gated")]
    with servers.Server(servers.HubHandler, folder=splits, busy=[503]) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(asked)], env=environment, text=True,
                              capture_output=True)
    assert done.returncode == 0, done.stderr
    (found, files, fingerprint), missing, split, gated = json.loads(done.stdout)
    assert found == texts(splits) and len(fingerprint) == 32
    sha = servers.HubHandler.sha
    assert files == [f"hf://datasets/owner/books@{sha}/data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert missing.startswith("data.repo=owner/none: ") and "doesn't exist" in missing
    assert split.startswith("data.split=tset: no such split") and "train, validation" in split
    assert gated.startswith("data.repo=owner/gated: ") and "gated" in gated
