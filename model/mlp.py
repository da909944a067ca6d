"""The dense feed-forward layer: SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from sieve.model.projection import one_launch


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); x [T, hidden] -> [T, hidden], no biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, *, step: bool = False) -> Tensor:
        """step: x are the tokens of a step of decoding."""
        if step and one_launch(x):
            from sieve.kernels.common import project_triton  # needs the package triton

            return self.down_proj(project_triton.swiglu(x, self.gate_proj.weight, self.up_proj.weight))
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
