"""Tensor descriptors: tiles of keys that the copy engine fetches, without an address or a bounds check per thread."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sieve.kernels.common.dims import split_dim


def head_descriptors(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Tiles of `rows` consecutive tokens of one head of x [N, heads, D], for the two parts of split_dim(D).

    Load at [token, head * D] and [token, head * D + d0]; tokens past the end read 0. Where D has one part, the second
    descriptor repeats the first. Copies x unless its heads lie side by side, 16-byte aligned.
    """
    n, heads, d = x.shape
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if not (aligned and x.stride(2) == 1 and x.stride(1) == d):
        x = x.clone(memory_format=torch.contiguous_format)
    first, second = split_dim(d)
    shape, strides = [n, heads * d], [x.stride(0), 1]
    return tuple(TensorDescriptor(x, shape, strides, [rows, part]) for part in (first, second or first))
