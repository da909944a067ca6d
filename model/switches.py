"""An NSA model with one thing changed, to ask what that thing is worth. Nothing is trained; weights stay as they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from sieve.kernels.full.api import attention
from sieve.kernels.nsa.api import nsa_attention
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing
from sieve.kernels.nsa.mass import oracle_blocks
from sieve.kernels.nsa.reference import combine, compressed_attention, select_blocks, selected_attention
from sieve.model.decoder import Decoder
from sieve.model.nsa import NSA

Operator = Callable[..., tuple[Tensor, Tensor]]
BRANCHES = ("compression", "selection", "window")


@contextlib.contextmanager
def switched(decoder: Decoder, operator: Operator) -> Iterator[None]:
    """Within it, the NSA layers call `operator` in place of nsa_attention (whole texts only, not with a cache)."""
    layers = [layer.attention for layer in decoder.layers if isinstance(layer.attention, NSA)]
    if not layers:
        raise ValueError(f"{decoder.config.name} has no NSA layer; there is nothing to switch")
    before = [layer.operator for layer in layers]
    try:
        for layer in layers:
            layer.operator = operator
        yield
    finally:
        for layer, was in zip(layers, before):
            layer.operator = was


def without(branch: str) -> Operator:
    """The branch adds nothing, as if its gates were shut."""
    if branch not in BRANCHES:
        raise ValueError(f"branch={branch!r} is not one of {', '.join(BRANCHES)}")

    def operator(*args, **kwargs) -> tuple[Tensor, Tensor]:
        *tensors, gates, packing, geometry = args
        gates = gates.clone()
        gates[:, :, BRANCHES.index(branch)] = 0
        return nsa_attention(*tensors, gates, packing, geometry, **kwargs)

    return operator


def with_topk(topk: int) -> Operator:
    """Another number of selected blocks, forced ones included."""

    def operator(*args, **kwargs) -> tuple[Tensor, Tensor]:
        *rest, geometry = args
        return nsa_attention(*rest, dataclasses.replace(geometry, topk=topk), **kwargs)

    return operator


def oracle(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float, impl: str = "auto", save_outputs: bool = True,
) -> tuple[Tensor, Tensor]:
    """The selection branch reads the topk blocks that full attention over its keys weighs most."""
    indices = oracle_blocks(q, k_slc, packing, geometry, scale=scale)
    o_slc, _ = selected_attention(q, k_slc, v_slc, indices, packing, geometry, scale=scale)
    o_cmp, _ = compressed_attention(q, k_cmp, v_cmp, packing, geometry, scale=scale)
    o_win = attention(q, k_win, v_win, packing, scale=scale, window=geometry.window_size)
    return combine(o_cmp, o_slc, o_win, gates), indices


def full(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    packing: Packing, geometry: Geometry, *, scale: float, impl: str = "auto", save_outputs: bool = True,
) -> tuple[Tensor, Tensor]:
    """The selection branch reads every token up to the query. The indices are those it would have read."""
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, packing, geometry, scale=scale)
    indices = select_blocks(q, k_cmp, lse, packing, geometry, scale=scale)
    o_slc = attention(q, k_slc, v_slc, packing, scale=scale)
    o_win = attention(q, k_win, v_win, packing, scale=scale, window=geometry.window_size)
    return combine(o_cmp, o_slc, o_win, gates), indices


def variants(geometry: Geometry, larger_topk: tuple[int, ...] = ()) -> dict[str, Operator]:
    """By name: each branch ablated, larger topk (none given: twice and four times), oracle, full."""
    topks = larger_topk or (2 * geometry.topk, 4 * geometry.topk)
    return (
        {f"without {branch}": without(branch) for branch in BRANCHES}
        | {f"topk {topk}": with_topk(topk) for topk in topks}
        | {f"oracle top {geometry.topk}": oracle, "full on selection's K/V": full}
    )
