"""A kernel whose warp-specialised parts share nothing, for compute-sanitizer's racecheck beside scripts/sanitize_kernels.py.

    compute-sanitizer --tool racecheck python scripts/sanitize_control.py

Each part stores one number to a place of its own, and no part touches shared memory. What racecheck reports here are the
bytes by which the compiler's `warp_specialize` tells the waiting warps what to do: they are written before and read
behind a named barrier of all warps (PTX: st.shared, barrier.sync 1, ld.shared.b8).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _store(out_ptr, PART: gl.constexpr):
    gl.store(out_ptr + PART, PART + 1)


@gluon.jit
def dispatch_only(out_ptr):
    gl.warp_specialize(
        [(_store, (out_ptr, 0)), (_store, (out_ptr, 1)), (_store, (out_ptr, 2))], [4, 1], [24, 24]
    )  # fmt: skip


if __name__ == "__main__":
    import torch

    found = torch.zeros(3, dtype=torch.int32, device="cuda")
    dispatch_only[(4,)](found, num_warps=4)
    print(found.tolist())
