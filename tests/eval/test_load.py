"""Exported folders: weights that are not those of config.json are refused, tied heads may be absent."""

import json

import pytest
import safetensors.torch
import torch

from sieve.eval.load import load_folder
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.decoder import Decoder
from sieve.model.hf import SieveForCausalLM
from sieve.model.init import initialize
from sieve.model.llama import to_llama


def load(folder):
    return load_folder(folder, torch.device("cpu"), torch.float32).decoder


@pytest.fixture(params=["sieve", "llama", "qwen3"])
def kind(request):
    return request.param


@pytest.fixture
def make(kind, tmp_path):
    """make(tie): a decoder, and the folder it was exported to."""

    def make(tie=False):
        model = ModelConfig(name="m", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim_qk=8, head_dim_v=8,
                            intermediate_size=48, tie_embeddings=tie)
        decoder = Decoder(model, AttentionConfig(type="full", qk_norm=kind == "qwen3"), 61)
        initialize(decoder, 0)
        made = SieveForCausalLM.of(decoder) if kind == "sieve" else to_llama(decoder, max_position_embeddings=64)
        made.save_pretrained(tmp_path)
        return decoder, tmp_path

    return make


def change(folder, edit):
    """Apply `edit` to the folder's tensors by name."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    edit(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tie", [True, False])
def test_whole_folders_load(make, tie):
    decoder, folder = make(tie)
    for mine, theirs in zip(decoder.parameters(), load(folder).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_of_another_model_are_refused(make, kind):
    _, folder = make()
    down, head = "layers.1.mlp.down_proj.weight", "head.weight" if kind == "sieve" else "lm_head.weight"
    key = down if kind == "sieve" else f"model.{down}"
    change(folder, lambda weights: weights.pop(head))
    with pytest.raises(ValueError, match=rf"not those of its config.json: 1 missing \(.*{head}\)"):
        load(folder)
    change(folder, lambda weights: weights.update({head: torch.zeros(61, 32), "other": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"1 unexpected \(other\)"):
        load(folder)
    change(folder, lambda weights: weights.update({key: torch.zeros(3, 5)}) or weights.pop("other"))
    with pytest.raises(ValueError, match=rf"1 of another shape \(.*{down} \[3, 5\], not \[32, 48\]\)"):
        load(folder)


def test_folders_without_a_model(make):
    _, folder = make()
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="its weights cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights cannot be read"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="a model of type gpt2; sieve, llama and qwen3 can be read"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no exported model"):
        load(folder)
