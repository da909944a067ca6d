from __future__ import annotations

import json
import subprocess

import torch

from sieve.model.count import count_parameters
from sieve.train.distributed import Place
from sieve.train.environment import environment, git_state
from sieve.train.overrides import load_config


def test_what_produced_a_run():
    config = load_config(["attention=nsa"])
    facts = environment(config, Place(0, 2, 0, torch.device("cpu")), 300)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"] == torch.__version__ and "deepspeed" in facts["packages"]
    assert (facts["device"], facts["gpu"], facts["world_size"], facts["vocab_size"]) == ("cpu", None, 2, 300)
    count = count_parameters(config.model, config.attention, 300)
    assert (facts["parameters"]["total"], facts["parameters"]["active"]) == (count.total, count.active)
    assert set(facts["flops_per_token"]) >= {"cmp", "slc", "win", "projections", "lm_head"}
    full = environment(load_config(["attention=full"]), Place(0, 1, 0, torch.device("cpu")), 300)
    # Full attention's share is the sum of its parts; NSA has projections of its own beside the same pairs.
    assert full["dense_flops_per_token"] == sum(full["flops_per_token"].values())


def test_git_state_has_commit_changes_and_new_files(tmp_path):
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["diff"] == "" and clean["untracked"] == ""
    (tmp_path / "a.py").write_text("x = 2\n")
    (tmp_path / "b.py").write_text("")
    changed = git_state(tmp_path)
    assert "+x = 2" in changed["diff"] and changed["untracked"] == "b.py"
