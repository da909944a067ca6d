"""phi of equation 7: one key or value from the kernel_size tokens of each compressed block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import CompressedSlots

PhiKind = Literal["mlp", "linear", "mean"]


@dataclass(frozen=True)
class PhiWeights:
    """What phi learns, shared by the KV heads; matrices as torch.nn.Linear stores them, [out, in].

    mlp: w_out SiLU(w_in flatten(x + position) + b_in) + b_out, with position [l, D] added inside the block,
        w_in [hidden, l * D], b_in [hidden], w_out [D, hidden], b_out [D].
    linear: w_in flatten(x + position) + b_in, with w_in [D, l * D], b_in [D].
    mean: the plain mean of the l tokens, no weights.
    position and the biases may be None.
    """

    kind: PhiKind
    position: Tensor | None = None
    w_in: Tensor | None = None
    b_in: Tensor | None = None
    w_out: Tensor | None = None
    b_out: Tensor | None = None


@dataclass(frozen=True)
class AfterPhi:
    """What an NSA layer does to phi's keys [C, Hkv, Dqk]. norm: an RMSNorm's weight [Dqk] and eps; rotation: cos and sin fp32
    [C, 1, Dqk // 2] at the blocks' first positions. None: not done."""

    norm: tuple[Tensor, float] | None
    rotation: tuple[Tensor, Tensor] | None


def _check(x: Tensor, slots: CompressedSlots, geometry: Geometry, weights: PhiWeights) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [T, Hkv, D], got {list(x.shape)}")
    T, _, D = x.shape
    l, C = geometry.kernel_size, T // geometry.kernel_stride
    if slots.start.numel() != C:
        raise ValueError(f"slots has {slots.start.numel()} slots, x {list(x.shape)} has {C}; made with another stride?")
    if weights.kind == "mean":
        return
    if weights.kind not in ("mlp", "linear"):
        raise ValueError(f"kind={weights.kind!r} is not one of mlp, linear, mean")
    if weights.w_in is None or (weights.kind == "mlp" and weights.w_out is None):
        raise ValueError(f"kind={weights.kind!r} needs w_in{' and w_out' if weights.kind == 'mlp' else ''}")
    hidden = weights.w_in.shape[0] if weights.kind == "mlp" else D
    wanted = {
        "position": (l, D), "w_in": (hidden, l * D), "b_in": (hidden,), "w_out": (D, hidden), "b_out": (D,),
    }
    for name, shape in wanted.items():
        w = getattr(weights, name)
        if w is not None and tuple(w.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} beside x {list(x.shape)} and kernel_size={l}, got {list(w.shape)}"
            )


def _shifted_sum(y: Tensor) -> Tensor:
    """y [Hkv, C, l/d, n]: what chunk c is worth as the j-th chunk of a block -> blocks' sums [Hkv, C, n].

    Block i is made of the chunks in slots i, i + 1, ..; past the last slot counts 0 (such a block is not valid).
    """
    total = y[:, :, 0]
    for j in range(1, min(y.shape[2], y.shape[1] + 1)):
        total = total + F.pad(y[:, j:, j], (0, 0, 0, j))
    return total


class _Chunks(torch.autograd.Function):
    """x [T, Hkv, D] -> the tokens of each slot's chunk [Hkv, C * d, D].

    A token is in one chunk at most, so that the gradient is a gather too; autograd's own would be a sum with atomics.
    What a slot without a chunk of its own holds has no gradient: no block has part in it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, start: Tensor, has_chunk: Tensor, d: int) -> Tensor:
        T = x.shape[0]
        token = (start[:, None] + torch.arange(d, device=x.device)).clamp_(max=max(T - 1, 0))
        ctx.save_for_backward(token, has_chunk)
        ctx.tokens = T
        return x.transpose(0, 1).index_select(1, token.flatten())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token, has_chunk), T = ctx.saved_tensors, ctx.tokens
        if not token.numel():
            return grad.new_zeros(T, grad.shape[0], grad.shape[2]), None, None, None
        rows = torch.arange(token.numel(), device=token.device).view_as(token)
        place = torch.full((T + 1,), -1, device=token.device)  # one more for what belongs nowhere
        place = place.scatter(0, torch.where(has_chunk[:, None], token, T).flatten(), rows.flatten())[:T]
        found = grad.index_select(1, place.clamp(min=0)).transpose(0, 1)
        return torch.where((place >= 0)[:, None, None], found, 0.0), None, None, None


def compress(x: Tensor, slots: CompressedSlots, geometry: Geometry, weights: PhiWeights) -> Tensor:
    """x [T, Hkv, D] packed, before RoPE -> [C, Hkv, D] in slots; 0 in slots that hold no block, or anything (see slots).

    The first layer is l/d products over the stride-d chunks, added with a shift: no overlapping copy of x is made.
    No gradient passes between documents. Raises ValueError when a weight's shape does not fit.
    """
    _check(x, slots, geometry, weights)
    (_, Hkv, D), l, d = x.shape, geometry.kernel_size, geometry.kernel_stride
    C, parts = slots.start.numel(), l // d
    chunks = _Chunks.apply(x, slots.start, slots.chunk, d)  # [Hkv, C * d, D]
    if weights.kind == "mean":
        sums = chunks.view(Hkv, C, 1, d, D).sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
        out = (_shifted_sum(sums.expand(-1, -1, parts, -1)) / l).to(x.dtype)
    else:
        n = weights.w_in.shape[0]
        # [n, l * D] -> [l/d * n, d * D]: one product gives each chunk's share in every place of a block.
        w = weights.w_in.view(n, parts, d * D).transpose(0, 1).reshape(parts * n, d * D)
        out = _shifted_sum(F.linear(chunks.view(Hkv, C, d * D), w).view(Hkv, C, parts, n))
        if weights.position is not None:  # the same for every block: a bias
            out = out + F.linear(weights.position.flatten(), weights.w_in)
        if weights.b_in is not None:
            out = out + weights.b_in
        if weights.kind == "mlp":
            out = F.linear(F.silu(out), weights.w_out, weights.b_out)
    out = out.transpose(0, 1)
    return out if slots.any_filling else torch.where(slots.valid[:, None, None], out, 0.0)
