"""What every layer of one forward shares: worked out once, passed down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sieve.kernels.nsa.layout import CompressedSlots, Packing
from sieve.model.chunk import Chunk
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.rope import rotation


@dataclass(frozen=True)
class Context:
    """packing: where the documents lie. rotation: cos and sin at the tokens' positions, fp32 [T, 1, Dqk // 2].
    slots: where compressed blocks lie; slot_rotation: cos and sin at their first tokens, fp32 [C, 1, Dqk // 2]; both
        None where no layer compresses. collect: whether layers report their health. chunk: where the tokens go in a
        cache; None in training.
    """

    packing: Packing
    rotation: tuple[Tensor, Tensor]
    slots: CompressedSlots | None
    slot_rotation: tuple[Tensor, Tensor] | None
    collect: bool = False
    chunk: Chunk | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: ModelConfig, attention: AttentionConfig, packing: Packing, collect: bool = False) -> Context:
        slots = slot_rotation = None
        if "nsa" in attention.layer_types(model.num_layers):
            slots = CompressedSlots.of(packing, attention.kernel_size, attention.kernel_stride)
            if attention.compressed_rope:
                slot_rotation = rotation(slots.position, model.rope, model.head_dim_qk)
        return cls(packing, rotation(packing.position, model.rope, model.head_dim_qk), slots, slot_rotation, collect)

    @classmethod
    def of_chunk(cls, model: ModelConfig, attention: AttentionConfig, chunk: Chunk) -> Context:
        """For new tokens that continue cached sequences."""
        slot_rotation = None
        if attention.compressed_rope and "nsa" in attention.layer_types(model.num_layers):
            slot_rotation = rotation(chunk.slots.position, model.rope, model.head_dim_qk)
        turned = rotation(chunk.position, model.rope, model.head_dim_qk)
        return cls(chunk.packing, turned, chunk.slots, slot_rotation, chunk=chunk)
