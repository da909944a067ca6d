"""One line in the log for each choice a process makes, said once, also from code that torch.compile traces."""

from __future__ import annotations

import functools
import logging

from sieve.kernels.common.compiling import constant


@functools.cache
def _log(name: str, message: str) -> None:
    logging.getLogger(name).info(message)


@constant
def log_once(name: str, message: str) -> None:
    """`message` to the logger `name` at level info, the first time this process says it."""
    _log(name, message)
