"""Whether Triton kernels can run where tensors are. Imports without triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from sieve.kernels.common.compiling import constant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@constant
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Triton kernels cannot serve tensors of this device and dtype; None when they can."""
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(str(t) for t in DTYPES)}, not {dtype}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, and TRITON_INTERPRET=1 is not set"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None
