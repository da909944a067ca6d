"""init=FOLDER: a run that begins with another model's weights."""

import json

import pytest
import safetensors.torch
import torch

from sieve.model.config import AttentionConfig, ModelConfig, RopeConfig, RopeScaling
from sieve.model.decoder import Decoder
from sieve.model.hf import SieveForCausalLM
from sieve.model.init import initialize
from sieve.model.llama import to_llama
from sieve.train.load import open_model
from sieve.train.overrides import load_config
from sieve.train.run import main, run
from sieve.train.schema import shown
from sieve.train.start import weights_of

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
    assert "model.hidden_size=64: that model has 32; give model.hidden_size=32" in capsys.readouterr().err
    assert main([*base, "name=other", "init=/nowhere"]) == 2
    assert "init=/nowhere is no folder" in capsys.readouterr().err
    assert main([*base, "name=other", f"init={folder}", "tokenizer.vocab_size=290"]) == 2
    assert "has a vocabulary of 300, the tokenizer one of 290; give its own with tokenizer.path" in capsys.readouterr().err


YARN = RopeConfig(theta=1234567.0, scaling=RopeScaling(factor=4.0, original_seq_len=32, beta_fast=16.0))
NSA = dict(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)


@pytest.fixture
def write(tmp_path):
    """write(kind, attention, **model): a folder of that kind, and the overrides that describe its model."""

    def write(kind, attention=None, **changes):
        sizes = dict(name="m", num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim_qk=8, head_dim_v=8,
                     intermediate_size=48)
        model = ModelConfig(**(sizes | changes))
        attention = attention or AttentionConfig(type="full", qk_norm=kind == "qwen3")
        decoder = Decoder(model, attention, 61)
        initialize(decoder, 0)
        made = SieveForCausalLM.of(decoder) if kind == "sieve" else to_llama(decoder, max_position_embeddings=64)
        made.save_pretrained(tmp_path / "folder")
        settings = model.model_dump(mode="json", exclude={"name"}) | {"moe": None}
        overrides = [f"model.{key}={shown(value)}" for key, value in settings.items()]
        overrides += [f"attention.qk_norm={shown(attention.qk_norm)}", "attention.type=full"]
        return decoder, tmp_path / "folder", overrides

    return write


def refusal(folder, overrides):
    """What is said of a run with these overrides that begins with the folder."""
    with pytest.raises(ValueError) as error:
        weights_of(folder, load_config(["name=x", *overrides]), 61)
    return str(error.value)


@pytest.mark.parametrize("kind", ["sieve", "llama", "qwen3"])
def test_every_difference_is_named_with_what_mends_it(write, kind):
    decoder, folder, same = write(kind, rope=YARN, norm_eps=1e-6, tie_embeddings=True)
    initial = weights_of(folder, load_config(["name=x", *same]), 61)
    for name, value in decoder.state_dict().items():
        assert torch.equal(initial(name, value.shape), value), name
    changed = {
        "model.num_layers": (2, 3), "model.hidden_size": (64, 32), "model.num_heads": (8, 4), "model.num_kv_heads": (1, 2),
        "model.head_dim_qk": (16, 8), "model.head_dim_v": (16, 8), "model.intermediate_size": (64, 48),
        "model.rope.theta": (10000, 1234567.0), "model.rope.scaling.factor": (2, 4), "model.norm_eps": ("1e-05", "1e-06"),
        "model.tie_embeddings": ("false", "true"),
        "attention.qk_norm": ("false", "true") if kind == "qwen3" else ("true", "false"),
    }
    lines = refusal(folder, [*same, *(f"{key}={ours}" for key, (ours, _) in changed.items())]).splitlines()
    assert lines[0] == f"init={folder} is another model than the run's:"
    assert sorted(lines[1:]) == sorted(
        f"{key}={ours}: that model has {theirs}; give {key}={theirs}" for key, (ours, theirs) in changed.items()
    )
    mended = [line.rpartition("give ")[2] for line in lines[1:]]
    weights_of(folder, load_config(["name=x", *same, *mended]), 61)
    text = refusal(folder, [*same, "model.rope.scaling=null"])
    mended = text.rpartition("give ")[2]
    assert mended == "model.rope.scaling={type:yarn,factor:4,original_seq_len:32,beta_fast:16,beta_slow:1}"
    weights_of(folder, load_config(["name=x", *same, "model.rope.scaling=null", mended]), 61)
    assert "model.moe={" in refusal(folder, [*same, "model.moe={num_experts:4,top_k:2,expert_size:16}"])


@pytest.mark.parametrize("kind", ["sieve", "llama"])
def test_weights_that_are_not_the_config_s_are_refused(write, kind):
    decoder, folder, same = write(kind)
    file = folder / "model.safetensors"
    whole = safetensors.torch.load_file(file)
    key, head = ("{}", "head.weight") if kind == "sieve" else ("model.{}", "lm_head.weight")
    down = key.format("layers.2.mlp.down_proj.weight")

    def changed(**weights):
        kept = {name: value for name, value in (whole | weights).items() if value is not None}
        safetensors.torch.save_file(kept, file, {"format": "pt"})
        return refusal(folder, same)

    said = "its weights are not those of its config.json: 1"
    assert f"{said} missing ({head})" in changed(**{head: None})
    assert f"{said} unexpected (other)" in changed(other=torch.zeros(2))
    assert f"{said} of another shape ({down} [3, 5], not [32, 48])" in changed(**{down: torch.zeros(3, 5)})
    safetensors.torch.save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, {"format": "pt"})
    weights_of(folder, load_config(["name=x", *same]), 61)
    config = json.loads((folder / "config.json").read_text())
    if kind == "llama":  # as older folders have it
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0}))
        assert "model.rope.theta=10000: that model has 500000; give model.rope.theta=500000" in refusal(folder, same)
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 32}
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "rope_scaling": scaling}))
        assert f"init={folder}: rope_parameters" in refusal(folder, same)
    (folder / "config.json").unlink()
    assert "is no exported model: config.json" in refusal(folder, same)


def test_what_nsa_learnt_is_not_dropped(write, caplog):
    decoder, folder, same = write("sieve", AttentionConfig(type="nsa", phi="linear", **NSA))
    same = [*same, "attention.type=nsa", "attention.phi=linear", *(f"attention.{key}={value}" for key, value in NSA.items())]
    weights_of(folder, load_config(["name=x", *same]), 61)
    assert not caplog.records
    text = refusal(folder, [*same, "attention.type=full"])
    assert "tensors that the run has no place for (layers.0.attention." in text and "attention.type=nsa" in text
    assert "attention.share_kv=false" in refusal(folder, [*same, "attention.share_kv=true"])
    text = refusal(folder, [*same, "attention.kernel_stride=8", "attention.phi=mean"])
    assert "attention.kernel_stride=8: that model has 4" in text and "attention.phi=mean: that model has linear" in text
    weights_of(folder, load_config(["name=x", *same, "attention.topk=5"]), 61)
    assert "was trained with attention.topk=4, this run has 5" in caplog.text


def test_the_experts_bias_goes_on(write, one_rank, tiny_text, tmp_path):
    base = [*tiny_text, "optim.lr=1e-30", "optim.weight_decay=0", "steps=1", "eval.every=0", "checkpoint.every=1",
            f"runs_dir={tmp_path}", "attention=full", "model.moe.bias_update=sign", "model.moe.bias_update_rate=0"]
    assert run(load_config([*base, "name=first"])) == 0
    first = opened("first", tmp_path)
    bias = first.layers[1].mlp.router.bias
    bias.copy_(torch.arange(4) / 10)
    SieveForCausalLM.of(first).save_pretrained(tmp_path / "folder")
    assert run(load_config([*base, "name=second", "seed=5", f"init={tmp_path / 'folder'}"])) == 0
    assert torch.equal(opened("second", tmp_path).layers[1].mlp.router.bias, bias)
