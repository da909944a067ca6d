from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sieve.model.count import count_parameters
from sieve.train.build import build_model
from sieve.train.config import RunConfig
from sieve.train.overrides import config_groups, load_config

# What a choice needs beside it.
ALSO = {
    "zero=0": ["dtype=fp32"], "experiment=twin-gpu": ["device=cpu"], "experiment=recall-8k": ["device=cpu"],
}


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in config_groups().items() for name in names])
def test_every_shipped_config_composes_and_builds(choice):
    config = load_config([choice, *ALSO.get(choice, [])])
    vocab = config.tokenizer.vocab_size
    model = build_model(config, torch.device("meta"), vocab)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config.model, config.attention, vocab).total
    assert RunConfig.of(config.dump()) == config, "config.yaml would not give the same run"


@pytest.mark.parametrize("model", config_groups()["model"])
@pytest.mark.parametrize("attention", [*config_groups()["attention"], "[full,nsa]"])
def test_every_model_builds_with_every_attention(model, attention):
    build_model(load_config([f"model={model}", f"attention={attention}"]), torch.device("meta"), 1000)


def test_a_name_follows_from_the_choices():
    assert load_config(["attention=full"]).directory == Path("runs/tiny-full-python")
    assert load_config(["name=x", "runs_dir=/tmp/r"]).directory == Path("/tmp/r/x")


def test_the_length_of_a_run():
    step = ["global_batch=2", "seq_len=100"]
    assert load_config([*step, "tokens=200"]).total_steps == 1
    assert load_config([*step, "tokens=201"]).total_steps == 2
    assert load_config([*step, "steps=5"]).total_steps == 5
    assert load_config(step).phases[0].tokens_per_step == 200


def test_the_length_of_a_run_with_phases():
    step = ["global_batch=2", "seq_len=100", "data.phases=[{from_tokens:450,seq_len:400,global_batch:1}]"]
    assert load_config([*step, "tokens=400"]).total_steps == 2
    assert load_config([*step, "tokens=600"]).total_steps == 3
    assert load_config([*step, "tokens=601"]).total_steps == 4
    assert load_config([*step, "tokens=1400"]).total_steps == 5


def test_resume_takes_a_step_as_a_number():
    assert load_config(["resume=200"]).resume == "200"


def test_a_config_is_frozen_and_closed():
    config = load_config()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        RunConfig.of(config.dump() | {"sed": 1})


def test_dense_len_concerns_nsa_layers_alone():
    assert load_config(["zero=3", "attention=full", "attention.dense_len=64"]).attention.dense_len == 64


def test_offloading_needs_checkpointing():
    with pytest.raises(ValueError, match="activation_offload=true with activation_checkpointing=none.*choose"):
        load_config(["activation_offload=true"])
    assert load_config(["activation_offload=true", "activation_checkpointing=full"]).activation_offload


LATER = "data.phases=[{from_tokens:1000000,seq_len:2048}]"


@pytest.mark.parametrize("changes, told", [
    (["eval.every=0", "eval.tasks=[mqar]"], "eval.tasks=[mqar] are never measured, since eval.every=0"),
    (["model.moe.first_dense_layers=9"], "model.moe.first_dense_layers=9 of model.num_layers=4 are dense"),
    (["model.moe.balance=aux", "model.moe.bias_update=quantile"], "=quantile moves no bias with model.moe.balance=aux"),
    (["steps=3", LATER], "data.phases[0].from_tokens=1000000 is never reached in 3 steps"),
], ids=["eval", "dense", "aux", "phase"])  # fmt: skip
def test_what_never_happens_is_told(changes, told):
    (said,) = load_config(changes).without_effect()
    assert told in said
    assert load_config(["steps=3000", LATER, "eval.tasks=[mqar]"]).without_effect() == []
