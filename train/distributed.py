"""Where this process stands among the others: rank, device, process group, and the few collectives of training."""

from __future__ import annotations

import os
import secrets
import time
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
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=_TIMEOUT))
        store = dist.PrefixStore(_agreed_token(store, place), store)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _agreed_token(store: dist.Store, place: Place) -> str:
    """A name that no earlier start of this job has had in `store`, the same on all ranks.

    torchrun keeps its store when it starts the ranks of a job anew, and gloo's of torch 2.13 then read the addresses of
    processes that are gone, and wait for them. Every rank asks rank 0 by a number of its own, so that no answer of an
    earlier start can be taken for this one's.
    """
    if place.rank:
        mine = secrets.token_hex(8)
        store.set(f"sieve/hello/{place.rank}", mine)
        token = store.get(f"sieve/welcome/{place.rank}/{mine}").decode()  # waits until it is there
        store.set(f"sieve/heard/{token}/{place.rank}", "")
        return token
    token = secrets.token_hex(8)
    waiting, until = set(range(1, place.world_size)), time.monotonic() + _TIMEOUT.total_seconds()
    while waiting:
        for rank in list(waiting):
            if store.check([f"sieve/heard/{token}/{rank}"]):
                waiting.remove(rank)
            elif store.check([f"sieve/hello/{rank}"]):
                store.set(f"sieve/welcome/{rank}/{store.get(f'sieve/hello/{rank}').decode()}", token)
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {', '.join(map(str, sorted(waiting)))} have not come within {_TIMEOUT}")
        time.sleep(0.01)
    return token


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, in place; on one rank they are left as they are."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def concat_over_ranks(values: Tensor, dim: int) -> Tensor:
    """Every rank's `values` (of one shape), one after the other along `dim` in the order of the ranks, on all of them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values)
        return torch.cat(parts, dim)
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
