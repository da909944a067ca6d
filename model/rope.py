"""Rotary position embedding (arXiv 2104.09864), halves rotated against each other as in Llama, and its YaRN stretching.

Dimension i of a head's first half and dimension i of its second half are one pair, turned by position * frequency[i].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sieve.kernels.common.availability import why_not_triton
from sieve.kernels.common.compiling import cast
from sieve.model.config import RopeConfig, RopeScaling


def frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Radians per token of each pair: fp32 [head_dim // 2], falling from 1.

    With YaRN (arXiv 2309.00071, section 3.2) a pair that turns more than beta_fast times over the original length keeps
    its frequency, one that turns less than beta_slow times has it divided by `factor`, and those between are blended:
    linearly in the pair's index, as in the authors' code, where the paper's text has it linear in the number of turns.
    """
    pair = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    plain = 1.0 / rope.theta**pair
    if rope.scaling is None:
        return plain
    low, high = _blend_range(rope.scaling, rope.theta, head_dim)
    index = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    stretched = ((index - low) / (high - low)).clamp_(0, 1)
    return plain / rope.scaling.factor * stretched + plain * (1 - stretched)


def _blend_range(scaling: RopeScaling, theta: float, head_dim: int) -> tuple[float, float]:
    """The pairs' indices at which blending starts and ends."""

    def index(turns: float) -> float:
        return head_dim * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), head_dim - 1)
    return low, high if high != low else high + 1e-3


def attention_scale(rope: RopeConfig, head_dim: int) -> float:
    """What q k^T is multiplied by: 1/sqrt(head_dim), and with YaRN its temperature, (0.1 ln factor + 1)^2.

    The temperature stands here rather than in cos and sin so that keys that are not rotated get it too.
    """
    temperature = 1.0 if rope.scaling is None else (0.1 * math.log(rope.scaling.factor) + 1.0) ** 2
    return temperature / math.sqrt(head_dim)


def rotation(position: Tensor, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin for positions int32 [T]: each fp32 [T, 1, head_dim // 2], to be shared by all heads and layers."""
    angle = position.float()[:, None, None] * frequencies(rope, head_dim, position.device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [T, heads, D] turned by `rotation` (cos, sin: fp32 [T, 1, D // 2]); computed in fp32, returned in x's dtype."""
    return rotate_each((x,), rotation)[0]


def rotate_each(xs: Sequence[Tensor], rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Up to three tensors x [T, heads, D], each as `rotate` turns it, of one D and dtype.

    On a GPU where no gradient is wanted that is one launch, to the bit the same; a compiler fuses it by itself.
    """
    if not _in_one_launch(xs):
        return tuple(_Rotate.apply(x, *rotation) for x in xs)
    from sieve.kernels.common import rope_triton  # needs the package triton

    return rope_triton.rotate(xs, *rotation)


def _in_one_launch(xs: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or not all(x.is_cuda for x in xs):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        return False
    return why_not_triton(xs[0].device, xs[0].dtype) is None


class _Rotate(torch.autograd.Function):
    """A rotation's derivative is the rotation back: nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Each product is fp32, as cos and sin are; the result is rounded to x's dtype as it is written."""
    first, second = x.chunk(2, -1)
    halves = (first * cos, second, sin, -direction), (second * cos, first, sin, direction)
    if torch.compiler.is_compiling():  # a graph takes no view as out=, and fuses this into one pass itself
        return cast(torch.cat([torch.addcmul(a, b, c, value=sign) for a, b, c, sign in halves], -1), x.dtype)
    out = torch.empty_like(x)
    for part, (a, b, c, sign) in zip(out.chunk(2, -1), halves):
        torch.addcmul(a, b, c, value=sign, out=part)
    return out
