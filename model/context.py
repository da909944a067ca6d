"""What every layer of one forward shares: worked out once, passed down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sieve.kernels.nsa.layout import CompressedSlots, Packing
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.rope import rotation


@dataclass(frozen=True)
class Context:
    """packing: where the documents lie. rotation: cos and sin at the tokens' positions, fp32 [T, 1, Dqk // 2].
    slots: where compressed blocks lie; slot_rotation: cos and sin at their first tokens, fp32 [C, 1, Dqk // 2]; both
        None where no layer compresses: none is an NSA layer, or all documents are within attention.dense_len, so that
        NSA layers attend to all. collect: whether layers report their health.
    real: bool [T], which tokens are no padding; None: all.
    """

    packing: Packing
    rotation: tuple[Tensor, Tensor]
    slots: CompressedSlots | None
    slot_rotation: tuple[Tensor, Tensor] | None
    collect: bool = False
    real: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: ModelConfig, attention: AttentionConfig, packing: Packing, collect: bool = False,
        padding: Tensor | None = None,
    ) -> Context:
        slots = slot_rotation = None
        if "nsa" in attention.layer_types(model.num_layers) and packing.max_seqlen > attention.dense_len:
            slots = CompressedSlots.of(packing, attention.kernel_size, attention.kernel_stride)
            if attention.compressed_rope:
                slot_rotation = rotation(slots.position, model.rope, model.head_dim_qk)
        real = None if padding is None else ~padding.flatten()
        turn = rotation(packing.position, model.rope, model.head_dim_qk)
        return cls(packing, turn, slots, slot_rotation, collect, real)
