from __future__ import annotations

import pytest
import torch

from sieve.train.build import build_model
from sieve.train.optim import OptimConfig, adamw, parameter_groups
from sieve.train.overrides import load_config


def names(module: torch.nn.Module, config: OptimConfig) -> dict[str, set[str]]:
    by_id = {id(p): name for name, p in module.named_parameters()}
    return {g["name"]: {by_id[id(p)] for p in g["params"]} for g in parameter_groups(module, config)}


@pytest.mark.parametrize("tied", [True, False])
def test_what_decays(tied):
    config = load_config(["model=tiny", "attention=nsa", "attention.qk_norm=true", f"model.tie_embeddings={tied}"])
    module = build_model(config, torch.device("meta"), 300)
    groups = names(module, OptimConfig())
    every = {name for name, _ in module.named_parameters()}
    assert groups["decay"] | groups["no_decay"] == every and not groups["decay"] & groups["no_decay"]
    spared = {name for name in every if "norm" in name or name.endswith("phi.position") or name.startswith("embed.")}
    assert groups["no_decay"] == spared
    assert {"layers.1.mlp.router.weight", "layers.1.mlp.experts.gate_up"} <= groups["decay"]
    assert ("head.weight" in groups["decay"]) is not tied
    assert not any("bias" in name for name in every), "the router's bias must be a buffer"
    with_embeddings = names(module, OptimConfig(decay_embeddings=True))
    assert with_embeddings["no_decay"] == spared - {"embed.weight"}


def test_the_decay_is_decoupled_and_only_where_it_belongs():
    config = load_config(["model.num_layers=2", "model.hidden_size=32", "attention=full"])
    module = build_model(config, torch.device("cpu"), 50)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = adamw(module, OptimConfig(lr=0.1, weight_decay=0.5), torch.device("cpu"))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient, decoupled decay is a factor of 1 - lr * decay
    for name, parameter in module.named_parameters():
        factor = 1.0 if "norm" in name or name.startswith("embed") else 0.95
        torch.testing.assert_close(parameter, before[name] * factor)


def test_settings_reach_the_optimizer():
    module = torch.nn.Linear(3, 3)
    optimizer = adamw(module, OptimConfig(lr=0.3, betas=(0.5, 0.6), eps=1e-3), torch.device("cpu"))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.5, 0.6), 1e-3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [OptimConfig().weight_decay, 0.0]
