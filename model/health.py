"""Whether an NSA layer uses its branches and its selection: scalars, from what the forward computed anyway."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing

SATURATED = 0.02  # a gate nearer than this to 0 or 1 passes next to no gradient
NAMES = (
    "gate_cmp", "gate_slc", "gate_win", "saturated_cmp", "saturated_slc", "saturated_win", "selected_distance",
    "forced_share", "selection_overlap", "selection_entropy", "never_selected",
)


def unknown_health(device: torch.device) -> dict[str, Tensor]:
    """What `nsa_health` gives of a layer that neither gated nor selected: its names, so that ranks agree on them, NaN."""
    return {name: torch.full((), float("nan"), device=device) for name in NAMES}


def layer_health(
    gates: Tensor | None, indices: Tensor | None, packing: Packing, geometry: Geometry, device: torch.device
) -> dict[str, Tensor]:
    """`nsa_health` of an NSA layer, or `unknown_health` of one that attended densely and so has neither."""
    return unknown_health(device) if gates is None else nsa_health(gates, indices, packing, geometry)


@torch.no_grad()
def nsa_health(gates: Tensor, indices: Tensor, packing: Packing, geometry: Geometry) -> dict[str, Tensor]:
    """gates [T, H, 3] and indices int32 [T, Hkv, topk] of one layer -> fp32 scalars on their device, no host sync.

    gate_cmp, gate_slc, gate_win: the branch's gate, mean over tokens and heads. saturated_cmp, ..: the share of its
        gates within 0.02 of 0 or 1.
    selected_distance: tokens from a query back to a selected block's first token (its position less block_size times
        the block), mean over all queries, groups and selected blocks, the forced ones included.
    forced_share: which share of the selected blocks is forced (the initial and the local ones): 1 as long as documents
        are too short to leave anything to choose.
    selection_overlap: which share of a query's selected blocks the preceding query of the same document and group had
        selected too; mean over queries that have a predecessor, and groups. 0 when there is none.
    selection_entropy: of how far back free (not forced) choices lie, in blocks, over the logarithm of the number of
        distances that the longest document allows: 1 when every distance is chosen alike, 0 when it is always the same
        one or there is no choice.
    never_selected: the share of blocks, by document and group, that no query chose freely, among those that any could
        have: neither initial nor local to the document's last query.
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

    free = chosen & ~forced
    gate = gates.float().mean((0, 1))
    saturated = ((gates < SATURATED) | (gates > 1 - SATURATED)).float().mean((0, 1))
    found = (
        *gate.unbind(), *saturated.unbind(), distance / count, forced.sum() / count, overlap,
        _entropy(current - indices, free, packing, geometry), _never_selected(indices, free, packing, geometry),
    )
    return dict(zip(NAMES, found, strict=True))


def _entropy(back: Tensor, free: Tensor, packing: Packing, geometry: Geometry) -> Tensor:
    blocks = (packing.max_seqlen - 1) // geometry.block_size + 1
    least = geometry.local_blocks  # the nearest that is not forced
    possible = blocks - geometry.init_blocks - least
    counts = torch.zeros(max(blocks, 1), dtype=torch.float32, device=back.device)
    counts.scatter_add_(0, back.clamp(0, counts.numel() - 1).long().flatten(), free.float().flatten())
    p = counts / counts.sum().clamp(min=1)
    entropy = torch.special.entr(p).sum()
    return entropy / math.log(possible) if possible > 1 else entropy * 0


def _never_selected(indices: Tensor, free: Tensor, packing: Packing, geometry: Geometry) -> Tensor:
    size, (T, groups, _) = geometry.block_size, indices.shape
    first = packing.cu_seqlens // size + torch.arange(packing.cu_seqlens.numel(), device=indices.device)
    places = T // size + packing.cu_seqlens.numel() + 1  # documents' blocks, none shared
    used = torch.zeros(groups, places + 1, dtype=torch.bool, device=indices.device)
    place = torch.where(free, first[packing.doc][:, None, None] + indices, places).long()
    group = torch.arange(groups, device=indices.device)[None, :, None].expand_as(place)
    used[group, place] = True
    # A token that begins a block which is free to be chosen by its document's last query stands for the block.
    length = packing.cu_seqlens.diff()[packing.doc]
    block = packing.position // size
    last = (length - 1) // size
    candidate = (packing.position % size == 0) & (block >= geometry.init_blocks) & (block <= last - geometry.local_blocks)
    missed = ~used[:, (first[packing.doc] + block).long()] & candidate
    return missed.sum(dtype=torch.float32) / (candidate.sum() * groups).clamp(min=1)
