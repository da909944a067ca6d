"""The output layer: from hidden states to logits, or straight to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sieve.model.config import LossConfig
from sieve.model.loss import LossSums, linear_cross_entropy


class Head(nn.Module):
    """weight [vocab, hidden]. Loss and logits are both computed in this module's own forward, so that whatever gathers
    a module's weights around its forward (ZeRO-3) serves them too; with tied embeddings the weight is the embedding's.
    """

    def __init__(self, hidden: int, vocab_size: int, loss: LossConfig) -> None:
        super().__init__()
        self.loss = loss
        self.weight = nn.Parameter(torch.full((vocab_size, hidden), torch.nan))  # see sieve.model.init

    def forward(self, x: Tensor, labels: Tensor | None = None, per_token: bool = False) -> LossSums | Tensor:
        """x [T, hidden] -> LossSums for labels int64 [T] (-100 = none), or without labels the logits [T, vocab]."""
        if labels is None:
            return nn.functional.linear(x, self.weight)
        return linear_cross_entropy(x, self.weight, labels, self.loss, per_token)
