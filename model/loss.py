"""Cross entropy straight from the last hidden states: logits exist for one chunk of tokens at a time."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sieve.kernels.common.log import log_once
from sieve.model.config import LossConfig

IGNORE = -100
Chunk = Callable[[Tensor, Tensor, float, torch.dtype, bool], tuple[Tensor, Tensor, Tensor | None]]


class LossSums(NamedTuple):
    """loss: fp32 scalar, what is differentiated: cross entropy and z-loss, summed over labelled tokens.
    ce: fp32 scalar, the cross entropy's part, detached. token: fp32 [T], each token's cross entropy in nats, 0 where
    unlabelled, detached; None unless asked for.
    """

    loss: Tensor
    ce: Tensor
    token: Tensor | None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, config: LossConfig, per_token: bool = False
) -> LossSums:
    """x [T, hidden], weight [vocab, hidden], labels int64 [T] (-100 = none) -> sums in fp32, whatever x's dtype."""
    chosen = resolve_impl(config.impl, x.device)
    if chosen == "liger":
        return _liger(x, weight, labels, config, per_token)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not wants_grad:
        chosen = "torch"  # evaluation has texts of any length, and would compile for each of them
    body, size = _compiled_chunk() if chosen == "compiled" else _chunk, chunk_size(config, weight.shape[0], chosen)
    loss, token = _LinearCrossEntropy.apply(x, weight, labels, config.z_loss, size, wants_grad, body)
    return LossSums(loss, token.sum(), token if per_token else None)


def chunk_size(config: LossConfig, vocab: int, impl: str) -> int:
    """Tokens whose logits exist at once, where `impl` is what resolve_impl said."""
    if config.chunk_size is not None:
        return config.chunk_size
    return max(2**28 // vocab, 128) if impl == "compiled" else 1024


def resolve_impl(impl: str, device: torch.device) -> Literal["torch", "liger", "compiled"]:
    """Which implementation runs; "auto" logs its choice once. ValueError when liger is asked for and cannot be had."""
    if impl == "auto":
        impl = "compiled" if device.type == "cuda" else "torch"
        log_once(__name__, f"cross entropy: {impl}, by chunks, on {device.type}")
    if impl == "liger":
        reason = None
        if device.type != "cuda":
            reason = f"the tensors are on {device.type}"
        elif importlib.util.find_spec("liger_kernel") is None:
            reason = "the package liger-kernel is not installed"
        if reason is not None:
            raise ValueError(f"loss.impl='liger' cannot be had: {reason}; use loss.impl='torch' or 'auto'")
    return impl


def _chunk(
    logits: Tensor, labels: Tensor, z_loss: float, dtype: torch.dtype, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a chunk's logits [n, vocab], fp32 or wider and overwritten: each token's cross entropy [n], the sum of the squared
    log-partitions, and the slope d/dlogits [n, vocab] in `dtype`."""
    kept = (labels != IGNORE).to(logits.dtype)[:, None]
    label = labels.clamp(min=0)[:, None]
    top = logits.amax(-1, keepdim=True)
    own = logits.gather(-1, label)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    lse = total.log().add_(top)
    token, penalty = ((lse - own) * kept).squeeze(-1), (lse.square() * kept).sum()
    if not wants_grad:
        return token, penalty, None
    # d/dlogits (ce + z * lse^2) = (1 + 2 z lse) softmax - [label]
    logits.mul_((1 + 2 * z_loss * lse) * kept / total).scatter_add_(-1, label, -kept)
    return token, penalty, logits.to(dtype)


def _chunk_in_one_pass(
    logits: Tensor, labels: Tensor, z_loss: float, dtype: torch.dtype, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same from logits of any dtype, which stay as they are, written so that a compiler makes two passes of it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept = (labels != IGNORE).to(wide)[:, None]
    label = labels.clamp(min=0)[:, None]
    x = logits.to(wide)
    lse = x.logsumexp(-1, keepdim=True)
    own = logits.gather(-1, label).to(wide)
    token, penalty = ((lse - own) * kept).squeeze(-1), (lse.square() * kept).sum()
    if not wants_grad:
        return token, penalty, None
    softmax = (x - lse).exp()
    hit = torch.arange(logits.shape[-1], device=logits.device) == label
    return token, penalty, (((1 + 2 * z_loss * lse) * softmax - hit.to(wide)) * kept).to(dtype)


@functools.cache
def _compiled_chunk() -> Chunk:
    return torch.compile(_chunk_in_one_pass, fullgraph=True, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is worked out beside the loss, while a chunk's logits exist, and only scaled in the backward: the
    loss is a scalar, so the chain rule allows it, and no logits are computed twice. What lives on between forward and
    backward is a gradient the size of x and one, in fp32, the size of weight.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, labels: Tensor, z_loss: float, chunk: int, wants_grad: bool, body: Chunk
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        token = x.new_empty(x.shape[0], dtype=wide)
        penalty = x.new_zeros((), dtype=wide)
        grad_x = torch.empty_like(x) if wants_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_grad else None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = x[rows] @ weight.mT  # [chunk, vocab]
            if body is _chunk:
                logits = logits.to(wide)
            token[rows], squares, slope = body(logits, labels[rows], z_loss, x.dtype, wants_grad)
            penalty += squares
            if wants_grad:
                torch.matmul(slope, weight, out=grad_x[rows])
                if slope.dtype == wide:
                    grad_weight.addmm_(slope.mT, x[rows])
                else:
                    grad_weight += slope.mT @ x[rows]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(token)
        return token.sum() + z_loss * penalty, token

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (grad_x * grad).to(grad_x.dtype), (grad_weight * grad).to(ctx.dtype), None, None, None, None, None


def _liger(x: Tensor, weight: Tensor, labels: Tensor, config: LossConfig, per_token: bool) -> LossSums:
    """With per_token liger computes the logits once more in the backward, since its tokens could be weighed apart."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    result = liger_fused_linear_cross_entropy(
        x, weight, labels, ignore_index=IGNORE, lse_square_scale=config.z_loss, return_z_loss=True,
        reduction="none" if per_token else "sum", accum_dtype=torch.float32,
    )
    ce = (result.loss - result.z_loss).detach()  # its loss contains the z-loss
    return LossSums(result.loss.sum(), ce.sum(), ce if per_token else None)
