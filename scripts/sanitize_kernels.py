"""The NSA operator's forward and backward, or a step over a cache, at a tiny shape for each code path, for NVIDIA's
compute-sanitizer.

    python scripts/sanitize_kernels.py                                    # once without: compiles the kernels
    compute-sanitizer --tool memcheck python scripts/sanitize_kernels.py
    compute-sanitizer --tool racecheck python scripts/sanitize_kernels.py --paths group16
    compute-sanitizer --tool racecheck python scripts/sanitize_kernels.py --paths control,control-mbarrier   # no race at all

Memory comes straight from cudaMalloc, not from torch's cache, so that a byte past a tensor's end is seen. Exit status 2
without a GPU, else that of the sanitizer (give it --error-exitcode 1).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Path:
    """heads, KV heads, d_qk, d_v and dtype; lengths of the documents; whether the branches' outputs are kept."""

    shape: tuple[int, int, int, int]
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = (300, 1, 0, 99)
    save_outputs: bool = True
    decode: bool = False


PATHS = {
    "group16": Path((16, 1, 128, 128)),  # selection by the union of a tile's blocks
    "group16-192": Path((16, 1, 192, 128)),  # head dimensions in two parts
    "group4": Path((8, 2, 128, 128)),  # selection by blocks' lists
    "group5": Path((5, 1, 80, 96)),  # a group and head dimensions that are no powers of two
    "recompute": Path((16, 1, 64, 64), save_outputs=False),
    "fp32": Path((4, 1, 64, 64), "float32"),
    "decode16": Path((64, 4, 128, 128), lengths=(3000, 1, 31, 250), decode=True),
    "decode5": Path((10, 2, 192, 80), lengths=(700, 64), decode=True),
    "decode-fp32": Path((8, 2, 64, 64), "float32", lengths=(300, 20), decode=True),
    "one-token": Path((16, 1, 128, 128), lengths=(1,)),
}
CONTROL = ("control", "control-mbarrier")  # a kernel without races, see sieve.scripts.sanitize_control


def run(path: Path) -> None:
    """Forward and backward on random inputs; ends when the device has."""
    import torch

    from sieve.kernels.nsa.geometry import Geometry
    from sieve.kernels.nsa.layout import Packing
    from sieve.kernels.nsa.triton_ops import nsa_attention

    geometry = Geometry(32, 16, 64, topk=4, init_blocks=1, local_blocks=2, window_size=100)
    if path.decode:
        return _decode(path, geometry)
    (heads, kv_heads, d_qk, d_v), tokens = path.shape, sum(path.lengths)
    shapes = [(tokens, heads, d_qk)] + [(n, kv_heads, d) for n in (tokens // 16, tokens, tokens) for d in (d_qk, d_v)]
    options = {"device": "cuda", "dtype": getattr(torch, path.dtype)}
    inputs = [torch.randn(s, **options) for s in shapes] + [torch.rand(tokens, heads, 3, **options)]
    inputs = [x.requires_grad_() for x in inputs]
    ends = torch.tensor([0, *path.lengths], device="cuda").cumsum(0).int()
    packing = Packing.of(ends, tokens, max(path.lengths))
    out, _ = nsa_attention(*inputs, packing, geometry, scale=d_qk**-0.5, save_outputs=path.save_outputs)
    torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()


def _decode(path: Path, geometry) -> None:
    """NSA, full and window attention of one token a sequence, in caches with room to spare."""
    import torch

    from sieve.kernels.full.decode import cached_attention
    from sieve.kernels.nsa.decode import nsa_decode
    from sieve.scripts.bench.cases import Shape
    from sieve.scripts.bench.decode_cases import draw

    case = draw(Shape(*path.shape), list(path.lengths), geometry, dtype=getattr(torch, path.dtype))
    args = (case.q, *case.kv, case.gates, case.query, case.window_key, case.longest, geometry)
    nsa_decode(*args, scale=case.scale, impl="triton")
    for window in (None, geometry.window_size):
        cached_attention(case.q, *case.kv[2:4], case.query, None, scale=case.scale, window=window, impl="triton")
    cached_attention(
        case.q, *case.kv[4:], case.query, case.window_key, scale=case.scale, window=geometry.window_size, impl="triton"
    )
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", default=",".join(PATHS), help="names, separated by commas (default %(default)s)")
    names = parser.parse_args(argv).paths.split(",")
    unknown = sorted(set(names) - {*PATHS, *CONTROL})
    if unknown:
        parser.error(f"--paths: {', '.join(unknown)} is not of {', '.join((*PATHS, *CONTROL))}")
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # before the first allocation
    import torch

    if not torch.cuda.is_available():
        print("sanitize_kernels: needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    for name in names:
        if name in CONTROL:
            from sieve.scripts import sanitize_control

            sanitize_control.run(mbarriers=name == CONTROL[1])
        else:
            run(PATHS[name])
        print(f"{name}: done", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
