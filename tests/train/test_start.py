"""init=FOLDER: a run that begins with another model's weights."""

import json

import pytest
import torch

from sieve.model.hf import SieveForCausalLM
from sieve.model.llama import to_llama
from sieve.train.load import open_model
from sieve.train.overrides import load_config
from sieve.train.run import main, run

DENSE = ["model.moe=null", "optim.lr=1e-30", "optim.weight_decay=0", "steps=1", "eval.every=1", "checkpoint.every=1"]


def opened(name, folder):
    return open_model(name, str(folder), torch.device("cpu"), torch.float32).loaded.decoder


@pytest.mark.parametrize("llama", [False, True], ids=["exported", "llama"])
def test_goes_on_from_a_folder(one_rank, tiny_text, tmp_path, llama, capsys):
    base = [*tiny_text, *DENSE, f"runs_dir={tmp_path}"]
    assert run(load_config([*base, "name=full", "attention=full"])) == 0
    full = opened("full", tmp_path)
    folder = tmp_path / "folder"
    (to_llama(full, max_position_embeddings=64) if llama else SieveForCausalLM.of(full)).save_pretrained(folder)
    # Another seed, so that nothing agrees by chance; a learning rate of nothing, so that the weights are seen as they began.
    assert run(load_config([*base, "name=same", "attention=full", "seed=5", f"init={folder}"])) == 0
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["eval/loss"] for name in ("full", "same")
    ]
    assert losses[0] == losses[1]
    assert run(load_config([*base, "name=nsa", "attention=nsa", "seed=5", f"init={folder}", "dtype=bf16"])) == 0
    nsa = opened("nsa", tmp_path).layers[1].attention
    for mine, theirs in (("k_proj", "k_proj"), ("k_cmp_proj", "k_proj"), ("v_win_proj", "v_proj"), ("o_proj", "o_proj")):
        wanted = getattr(full.layers[1].attention, theirs).weight.bfloat16().float()
        assert torch.equal(getattr(nsa, mine).weight, wanted), mine
    capsys.readouterr()
    assert main([*base, "name=other", f"init={folder}", "model.hidden_size=64", "attention=full"]) == 2
    assert "embed.weight needs" in capsys.readouterr().err
    assert main([*base, "name=other", "init=/nowhere"]) == 2
    assert "init=/nowhere is no folder" in capsys.readouterr().err
    assert main([*base, "name=other", f"init={folder}", "tokenizer.vocab_size=290"]) == 2
    assert "has a vocabulary of 300, the tokenizer one of 290; give its own with tokenizer.path" in capsys.readouterr().err
