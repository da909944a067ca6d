"""Compiles the selected branch's kernels for sm_90 without a GPU: a JSON line a kernel, see tests/kernels/sm90.py.

A program, run with TRITON_INTERPRET unset: `select_sm90.py H HKV DQK DV DTYPE BLOCK TOPK`.
"""

import importlib.util
import sys
from pathlib import Path

import torch

TOKENS = 256


def main(heads: int, kv_heads: int, d_qk: int, d_v: int, dtype: torch.dtype, block: int, topk: int) -> None:
    spec = importlib.util.spec_from_file_location("sm90", Path(__file__).parents[1] / "sm90.py")
    sm90 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sm90)
    sm90.JITFunction.run = sm90.compile_launch
    torch.empty = torch.zeros

    from sieve.kernels.nsa.geometry import Geometry
    from sieve.kernels.nsa.layout import Packing
    from sieve.kernels.nsa.select_dkv import selected_dkv
    from sieve.kernels.nsa.select_dq import selected_dq
    from sieve.kernels.nsa.select_fwd import selected_attention_fwd

    geometry = Geometry(16, 16, block, topk, 1, 2, 512)
    packing = Packing.of(torch.tensor([0, 100, TOKENS], dtype=torch.int32), TOKENS, 156)
    shapes = (heads, d_qk), (kv_heads, d_qk), (kv_heads, d_v), (heads, d_v)
    q, k, v, do = (torch.zeros(TOKENS, *shape, dtype=dtype) for shape in shapes)
    indices = torch.zeros(TOKENS, kv_heads, topk, dtype=torch.int32)
    _, lse = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=0.1)
    rest = do, q, k, v, indices, lse, lse, packing, geometry
    selected_dq(*rest, scale=0.1)
    selected_dkv(*rest, scale=0.1)


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:5]), getattr(torch, sys.argv[5]), *(int(x) for x in sys.argv[6:8]))
