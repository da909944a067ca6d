"""One attention layer's output beside the reference's, on the tokens of the training itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sieve.kernels.nsa.layout import Packing
from sieve.model.context import Context
from sieve.model.decoder import Decoder
from sieve.train.distributed import extremes


class AttentionCheck:
    """Takes the input of a layer's attention from the next forward of `module`, and computes it twice.

    tokens: how many of the micro-batch's first ones are taken. layer: which one is watched.
    """

    def __init__(self, module: Decoder, tokens: int) -> None:
        self.module, self.tokens = module, tokens
        self.layer = 0
        self._taken: tuple[Tensor, Tensor] | None = None
        self._hook: Any = None

    def watch(self, turn: int) -> None:
        """Take the input of layer `turn` modulo their number in the forward that comes next."""
        self.layer = turn % len(self.module.layers)
        self._taken = None
        attention = self.module.layers[self.layer].attention
        self._hook = attention.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if self._taken is None:  # the first micro-batch, and not its recomputation
            packing = kwargs["context"].packing
            self._taken = args[0].detach()[: self.tokens].clone(), packing.cu_seqlens

    @torch.no_grad()
    def error(self) -> float:
        """Norm of the difference over the reference's norm, the largest of all ranks: about 1e-6 in fp32 and 5e-3 in
        bf16; more where rounding makes NSA choose another block. All ranks together."""
        self._hook.remove()
        x, edges = self._taken
        self._taken = None
        edges = torch.cat([edges[edges < len(x)], edges.new_tensor([len(x)])])
        packing = Packing.of(edges, len(x), int(edges.diff().max()))
        context = Context.of(self.module.config, self.module.attention_config, packing)
        attention = self.module.layers[self.layer].attention
        chosen = attention.impl
        ours = attention(x, context=context)[0].float()
        attention.impl = "reference"
        try:
            reference = attention(x, context=context)[0].float()
        finally:
            attention.impl = chosen
        error = (ours - reference).norm() / reference.norm()
        return float(extremes(error)[1])
