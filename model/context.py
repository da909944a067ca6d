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
        None where no layer compresses: none is an NSA layer, or `dense` without a cache. dense: all documents are
        within attention.dense_len, so that NSA layers attend to all. chunk: where the tokens go in a cache, and then
        documents are its sequences; None in training.
    real: bool [T], which tokens are no padding; None: all.
    """

    packing: Packing
    rotation: tuple[Tensor, Tensor]
    slots: CompressedSlots | None
    slot_rotation: tuple[Tensor, Tensor] | None
    dense: bool = False
    chunk: Chunk | None = None
    real: Tensor | None = None

    @property
    def step(self) -> bool:
        """Whether this is a step of decoding, of one new token a sequence."""
        return self.chunk is not None and self.chunk.step

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: ModelConfig, attention: AttentionConfig, packing: Packing, padding: Tensor | None = None
    ) -> Context:
        slots = slot_rotation = None
        dense = packing.max_seqlen <= attention.dense_len
        if "nsa" in attention.layer_types(model.num_layers) and not dense:
            slots = CompressedSlots.of(packing, attention.kernel_size, attention.kernel_stride)
            if attention.compressed_rope:
                slot_rotation = rotation(slots.position, model.rope, model.head_dim_qk)
        real = None if padding is None else ~padding.flatten()
        turn = rotation(packing.position, model.rope, model.head_dim_qk)
        return cls(packing, turn, slots, slot_rotation, dense, real=real)

    @classmethod
    def of_chunk(cls, model: ModelConfig, attention: AttentionConfig, chunk: Chunk) -> Context:
        """For new tokens that continue cached sequences, which are as long as the chunk makes them."""
        slot_rotation = None
        if attention.compressed_rope and "nsa" in attention.layer_types(model.num_layers):
            slot_rotation = rotation(chunk.slots.position, model.rope, model.head_dim_qk)
        turned = rotation(chunk.position, model.rope, model.head_dim_qk)
        dense = chunk.longest <= attention.dense_len
        return cls(chunk.packing, turned, chunk.slots, slot_rotation, dense=dense, chunk=chunk)
