"""AdamW and which parameters decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sieve.model.config import Config

if TYPE_CHECKING:
    import torch
    from torch import nn


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """AdamW (arXiv 1711.05101): the decay is decoupled from the gradient and scaled by the learning rate."""

    lr: float = Field(1e-3, gt=0, description="the schedule's peak")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = Field(False, description="whether the token embedding decays, a tied head with it")
    clip: float = Field(1.0, ge=0, description="largest gradient norm of a step; 0: no clipping")


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict]:
    """Two groups, `decay` and `no_decay`, with their weight_decay; an empty one is left out.

    Matrices decay. Not so vectors (norms, biases) and tables looked up by position (phi's intra-block embedding), nor
    embeddings unless asked for. The router's balancing bias is a buffer, so no optimizer touches it.
    """
    from torch import nn

    spared = {id(p) for name, p in module.named_parameters() if p.ndim < 2 or name.endswith("position")}
    if not config.decay_embeddings:
        spared |= {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "weight_decay": config.weight_decay, "params": [p for p in trained if id(p) not in spared]},
        {"name": "no_decay", "weight_decay": 0.0, "params": [p for p in trained if id(p) in spared]},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`, in one fused kernel on CUDA, able to skip a step: see sieve.train.skip."""
    from sieve.train.skip import SkippableAdamW  # here and above, so that reading a config need not wait for torch

    return SkippableAdamW(
        parameter_groups(module, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type == "cuda"
    )


def empty_state(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter before its first step, as torch makes it."""
    import torch

    fused = optimizer.defaults.get("fused")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
