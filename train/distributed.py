"""Where this process stands among the others: rank, device, process group, and the few collectives of training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

_LAUNCHED = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
_TIMEOUT = timedelta(minutes=30)  # rank 0 may build the token store while the others wait


@dataclass(frozen=True)
class Place:
    """rank of world_size processes, the local_rank-th on this machine, computing on `device`."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def of(cls, device: Literal["auto", "cpu", "cuda"]) -> Place:
        """As torchrun's environment says, or the only process. ValueError for a device that is not there."""
        rank, local_rank, world_size = (int(os.environ.get(*default)) for default in _LAUNCHED)
        if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError(f"WORLD_SIZE={world_size} without MASTER_ADDR and MASTER_PORT; start with torchrun")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch finds no CUDA device; choose device=cpu or auto")
        if device == "cpu" or not torch.cuda.is_available():
            return cls(rank, world_size, local_rank, torch.device("cpu"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} CUDA devices; start one "
                "process a device (torchrun --nproc-per-node)"
            )
        return cls(rank, world_size, local_rank, torch.device("cuda", local_rank))


@contextmanager
def process_group(place: Place) -> Iterator[None]:
    """Have the process group open, CPU tensors by gloo and CUDA tensors by NCCL; one that is open already stays so.

    One process alone needs no address and no port for it, so that runs beside each other never collide.
    """
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if place.device.type == "cuda" else "gloo"
    if place.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, in place; on one rank they are left as they are."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of every rank's `values`, element by element."""
    low, high = values.clone(), values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    return low, high


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank: all get the same answer."""
    return sum_over_ranks(torch.tensor(float(flag))).item() > 0


def from_rank_0(value: Any) -> Any:
    """Rank 0's `value` (anything that pickles), on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]
    return value


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (anything that pickles), in their order, on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values
    return [value]


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(()))
