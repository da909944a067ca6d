"""Without an NVIDIA device, Triton's kernels run in its interpreter: to be said before triton is first imported."""

import os
from pathlib import Path

devices = [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("dxg")]  # without initialising CUDA
if not devices or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
