"""What torch.compile has to be told, or spared, said without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Tracing calls `function` once, on constants, and goes on with its result, instead of tracing what it reads.

    For functions of the process alone: packages, environment, log. torch.compiler.assume_constant_result sets the same
    mark, but imports the compiler, which takes longer than all else of torch.
    """
    function._dynamo_marked_constant = True
    return function


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), for the end of what an autograd.Function returns: torch 2.11 traces a cast to the same dtype there into
    wrong gradients."""
    return x if x.dtype == dtype else x.to(dtype)
