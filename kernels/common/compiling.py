"""What torch.compile shall not look into, said without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Tracing calls `function` once, on constants, and goes on with its result, instead of tracing what it reads.

    For functions of the process alone: packages, environment, log. torch.compiler.assume_constant_result sets the same
    mark, but imports the compiler, which takes longer than all else of torch.
    """
    function._dynamo_marked_constant = True
    return function
