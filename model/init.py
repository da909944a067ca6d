"""Initial weights: every parameter drawn from a generator of its own, so that twins share whatever they have in common.

A parameter's values depend on the seed, its name, shape and role only: not on the other parameters, their order, the
device or the number of processes. NSA's selection branch calls its projections what full attention calls its own.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sieve.model.config import ModelConfig
from sieve.model.decoder import Decoder
from sieve.model.router import Router

AHEAD = 2**28  # numbers that are drawn before somebody takes them: 1 GB


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Set every parameter and buffer of `model`, on whatever device and in whatever dtype they are.

    Normal with standard deviation init_std, except: projections into the residual stream (o_proj, down_proj, the
    experts' down) have it divided by sqrt(2 * num_layers), so that the stream's variance does not grow with depth;
    norms are 1; phi starts as in `_deviation`. A tied head has no draw of its own.
    """
    names = ((name, parameter.shape) for name, parameter in model.named_parameters())
    values = drawn(names, lambda name, shape: initial_value(name, shape, model.config, seed))
    for parameter, value in zip(model.parameters(), values):
        parameter.copy_(value)
    for module in model.modules():
        if isinstance(module, Router):
            module.bias.zero_()


def drawn(
    names: Iterable[tuple[str, torch.Size]], value: Callable[[str, torch.Size], Tensor]
) -> Iterator[Tensor]:
    """`value` of each name and shape, in their order, made by several threads ahead of who takes them.

    A generator draws on one core, some seconds for each billion numbers.
    """
    workers = min(os.cpu_count() or 1, 16)
    ahead: deque[tuple[int, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="init") as pool:
        for name, shape in names:
            while ahead and (len(ahead) >= 2 * workers or shape.numel() + sum(n for n, _ in ahead) > AHEAD):
                yield ahead.popleft()[1].result()
            ahead.append((shape.numel(), pool.submit(value, name, shape)))
        while ahead:
            yield ahead.popleft()[1].result()


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The values of the Decoder parameter `name`: fp32, on the CPU."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("phi.position"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, _deviation(name, shape, config), generator=generator)


def _deviation(name: str, shape: torch.Size, config: ModelConfig) -> float:
    # phi keeps the size of what it compresses: by fan-in, and 2 because SiLU halves small inputs.
    if name.endswith("phi.w_in"):
        return shape[-1] ** -0.5
    if name.endswith("phi.w_out"):
        return 2 * shape[-1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down")):
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std
