"""Names for stretches of work in a profile: torch.profiler and Nsight find what was launched inside them."""

from __future__ import annotations

from torch.autograd.profiler import record_function

PREFIX = "sieve::"


def named(name: str) -> record_function:
    """A context whose launches stand under sieve::`name` in a profile; next to nothing without a profiler."""
    return record_function(PREFIX + name)
