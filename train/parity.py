"""Whether data-parallel ranks still hold the same weights: a fingerprint of every replicated tensor's bits, compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sieve.train.distributed import extremes
from sieve.train.partition import persistent_buffers

_CHUNK = 1 << 24  # elements: bounds the int64 copies
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksDisagree(RuntimeError):
    """Weights that should be equal on all ranks are not: one of them computed something else."""


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device: the sum, modulo 2**64, of each element's bits times an odd number of its
    place. Changes with any one element, and with any swap of two."""
    flat = tensor.detach().reshape(-1)
    flat = flat.view(_INTEGERS[flat.element_size()]) if flat.dtype != torch.bool else flat.view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, flat.numel(), _CHUNK):
        part = flat[begin : begin + _CHUNK].long()
        weights = torch.arange(begin, begin + len(part), device=tensor.device) * 2 + 1
        total += (part * weights).sum()
    return total


def replicated(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that every rank holds whole: at ZeRO stage 3 the small ones only."""
    whole = {
        name: p for name, p in module.named_parameters() if p.numel() == getattr(p, "ds_numel", p.numel())
    }
    return {**whole, **persistent_buffers(module)}


def check_parity(module: nn.Module) -> int:
    """Compare over all ranks, together; how many tensors agree. Raises RanksDisagree naming those that do not."""
    tensors = replicated(module)
    prints = torch.stack([fingerprint(t) for t in tensors.values()])
    low, high = extremes(prints)
    differ = [name for name, same in zip(tensors, (low == high).tolist()) if not same]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise RanksDisagree(
            f"the ranks hold different {', '.join(differ[:5])}{more}: a device or a collective computes wrongly, or "
            "something changed weights on one rank; nothing is saved of this state, resume from the last checkpoint"
        )
    return len(tensors)
