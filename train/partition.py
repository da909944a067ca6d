"""What this process holds of weights and optimizer state under any ZeRO stage, as ranges of named parameters.

DeepSpeed lays parameters end to end and cuts the result among the ranks, each stage in its own way (arXiv 1910.02054).
Told as (parameter, range), a state can be written by one number of ranks at one stage and read by another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sieve.train.optim import empty_state

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """Elements start .. stop - 1 of the flattened parameter `name`.

    tensors: fp32 views [stop - start] into the live state, the master weights under WEIGHT and the optimizer's under
        its own names. step: the optimizer's count of updates, a scalar that other pieces may share.
    """

    name: str
    start: int
    stop: int
    tensors: dict[str, Tensor]
    step: Tensor

    def narrow(self, start: int, stop: int) -> Piece:
        """The part of this piece in start .. stop - 1 of the parameter."""
        tensors = {kind: t[start - self.start : stop - self.start] for kind, t in self.tensors.items()}
        return Piece(self.name, start, stop, tensors, self.step)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Every parameter's whole shape, also where ZeRO-3 has left an empty tensor; tied ones once."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state, as every rank holds them."""
    kept = {name for name, _ in module.named_buffers()} & module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def pieces(stage: int, module: nn.Module, zero: Any, optimizer: torch.optim.Optimizer) -> list[Piece]:
    """All that this process holds: every parameter whole at stage 0, else its own partition.

    zero: DeepSpeed's ZeRO optimizer, anything at stage 0. optimizer: torch's, below it; a state that it has not made
    yet, since it has not stepped, is made here as it would make it.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    found = {0: _whole, 1: _flat_groups, 2: _flat_groups, 3: _sub_groups}[stage]
    result = []
    for name, start, flat, offset, count in found(names, module, zero):
        state = optimizer.state[flat]
        if not state:
            state.update(empty_state(flat, optimizer))
        alike = {kind: t for kind, t in state.items() if torch.is_tensor(t) and t.shape == flat.shape}
        tensors = {kind: t.detach().view(-1)[offset : offset + count] for kind, t in {WEIGHT: flat, **alike}.items()}
        result.append(Piece(name, start, start + count, tensors, state["step"]))
    return result


def refresh(stage: int, zero: Any) -> None:
    """Carry the master weights over to the parameters that the model computes with; all ranks together."""
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


# Each yields a parameter's name, its first element that is here, the flat tensor that the optimizer steps, where in it that
# element lies, and how many follow.
_Found = Iterator[tuple[str, int, Tensor, int, int]]


def _whole(names: dict[int, str], module: nn.Module, zero: Any) -> _Found:
    for parameter in module.parameters():
        yield names[id(parameter)], 0, parameter, 0, parameter.numel()


def _flat_groups(names: dict[int, str], module: nn.Module, zero: Any) -> _Found:
    for parameter in module.parameters():
        mapping = parameter._hp_mapping
        if mapping is None:  # lies in other ranks' partitions
            continue
        flat, = zero.optimizer.param_groups[mapping.param_group_index]["params"]
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield names[id(parameter)], here.start, flat, there.start, here.numel


def _sub_groups(names: dict[int, str], module: nn.Module, zero: Any) -> _Found:
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()  # the same on every rank: the last one's end is padding
            start = size * torch.distributed.get_rank(parameter.ds_process_group)
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                yield names[id(parameter)], start, flat, offset, count
            offset += size
