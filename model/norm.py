"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sieve.kernels.common.compiling import cast


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in fp32, returned in x's dtype.

    weight: [size], starts at one. x: [..., size] of any float dtype.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        # One fused kernel there, fp32 inside; and torch 2.11 traces _Normalise into wrong gradients.
        if x.is_cuda or torch.compiler.is_compiling():
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps).to(x.dtype)
        return _Normalise.apply(x, self.weight, self.eps)


class _Normalise(torch.autograd.Function):
    """The same without a fused kernel: a third of the passes over memory that autograd's own derivative takes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return cast((wide * rstd).mul_(weight), x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        unit = x * rstd  # rstd is fp32 or wider, and so are the products with it
        grad_weight = (grad * unit).reshape(-1, x.shape[-1]).sum(0)
        scaled = grad.to(unit.dtype) * weight
        along = torch.linalg.vecdot(scaled, unit).div_(x.shape[-1]).unsqueeze_(-1)
        grad_x = scaled.addcmul_(unit, along, value=-1).mul_(rstd)
        return cast(grad_x, x.dtype), cast(grad_weight, weight.dtype), None
