"""How the next token is chosen: the likeliest, or drawn from a tempered and cut distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from sieve.eval.config import Sampling


class Sampler:
    """Draws for one text: fp32 or wider on the CPU, so that equal logits give equal tokens on every device."""

    def __init__(self, sampling: Sampling, row: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed((sampling.seed + row * 0x9E3779B97F4A7C15) % 2**63)

    def __call__(self, logits: Tensor) -> int:
        """logits [vocab] -> the token. ValueError when they are no numbers."""
        top = logits.max()
        if not top.isfinite():
            raise ValueError(f"the model's logits are {top.item()}: its weights are broken, or overflow in {logits.dtype}")
        if self.sampling.temperature == 0:
            return int((logits == top).nonzero()[0])  # argmax promises no order among equals
        # The largest first to 0, so that no temperature, however small, takes it to infinity.
        scaled = (logits.double() - top.double()).cpu() / self.sampling.temperature
        probability, token = torch.softmax(scaled, -1).sort(descending=True, stable=True)
        total = probability.cumsum(-1)
        kept = probability.masked_fill(total - probability >= self.sampling.top_p, 0.0)  # the first one always stays
        return int(token[torch.multinomial(kept, 1, generator=self._generator)])
