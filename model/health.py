"""Whether an NSA layer uses its branches and its selection: six scalars, from what the forward computed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing

NAMES = ("gate_cmp", "gate_slc", "gate_win", "selected_distance", "forced_share", "selection_overlap")


def unknown_health(device: torch.device) -> dict[str, Tensor]:
    """What `nsa_health` gives of a layer that neither gated nor selected: its names, so that ranks agree on them, NaN."""
    return {name: torch.full((), float("nan"), device=device) for name in NAMES}


@torch.no_grad()
def nsa_health(gates: Tensor, indices: Tensor, packing: Packing, geometry: Geometry) -> dict[str, Tensor]:
    """gates [T, H, 3] and indices int32 [T, Hkv, topk] of one layer -> fp32 scalars on their device, no host sync.

    gate_cmp, gate_slc, gate_win: the branch's gate, mean over tokens and heads.
    selected_distance: tokens from a query back to a selected block's first token (its position less block_size times
        the block), mean over all queries, groups and selected blocks, the forced ones included.
    forced_share: which share of the selected blocks is forced (the initial and the local ones): 1 as long as documents
        are too short to leave anything to choose.
    selection_overlap: which share of a query's selected blocks the preceding query of the same document and group had
        selected too; mean over queries that have a predecessor, and groups. 0 when there is none.
    """
    chosen = indices >= 0
    position = packing.position[:, None, None]
    current = position // geometry.block_size
    count = chosen.sum(dtype=torch.float32)
    forced = chosen & ((indices < geometry.init_blocks) | (indices > current - geometry.local_blocks))
    distance = ((position - indices * geometry.block_size) * chosen).sum(dtype=torch.float32)

    # Entries are distinct, so each one meets at most one equal entry of the query before.
    again = (indices[1:, :, :, None] == indices[:-1, :, None, :]).any(-1) & chosen[1:]
    share = again.sum(-1) / chosen[1:].sum(-1).clamp(min=1)
    follows = (packing.position[1:] > 0).float()[:, None]  # so the token before is of the same document
    overlap = (share * follows).sum() / (follows.sum() * indices.shape[1]).clamp(min=1)

    gate = gates.float().mean((0, 1))
    return dict(zip(NAMES, (*gate.unbind(), distance / count, forced.sum() / count, overlap)))
