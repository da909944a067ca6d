"""Compression attention, backward: both kernels. Neither adds atomically: runs repeat bit for bit."""

from __future__ import annotations

from torch import Tensor

from sieve.kernels.nsa.compress_dkv import compressed_dkv
from sieve.kernels.nsa.compress_dq import compressed_dq
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import Packing


def compressed_attention_bwd(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, lse: Tensor, delta: Tensor, packing: Packing,
    geometry: Geometry, *, scale: float, dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """dk_cmp [C, Hkv, Dqk] and dv_cmp [C, Hkv, Dv]; q's gradient is added to dq [T, H, Dqk].

    do [T, H, Dv], q [T, H, Dqk], k_cmp, v_cmp in slots; lse, delta = sum(o * do): fp32 [T, H]. For an ungated do, give
    lse - log(gate), which is +inf at a gate of 0, and the ungated delta: the gate then stands in the weights.
    """
    compressed_dq(do, q, k_cmp, v_cmp, lse, delta, packing, geometry, scale=scale, dq=dq, add=True)
    return compressed_dkv(do, q, k_cmp, v_cmp, lse, delta, packing, geometry, scale=scale)
