"""A warp-specialised kernel whose warps share no data: what racecheck reports of it is the dispatch of the parts itself.

`sanitize_kernels.py --paths control,control-mbarrier` runs it. Its parts store numbers into global memory, each into a half of
its own. The shared bytes it touches are those that Triton's `warp_specialize` writes to tell the waiting warps which part to
run; and, as every kernel of ours that is made so, it may first have made mbarriers, which then nobody uses.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _number(out, number, WHICH: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = WHICH * 128 + gl.arange(0, 128, layout)
    gl.store(out + at, at * number)


@gluon.jit
def _nothing():
    pass


@gluon.jit(do_not_specialize=["number"])
def control(out, number, MBARRIER: gl.constexpr):
    if MBARRIER:
        unused = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(unused.index(0), count=1)
        fence_async_shared()
        tl.debug_barrier()
    gl.warp_specialize([(_number, (out, number, 0)), (_number, (out, number, 1)), (_nothing, ())], [4, 1], [240, 24])


def run(mbarriers: bool) -> None:
    """Launches it; RuntimeError where what it stored is wrong."""
    out = torch.zeros(256, dtype=torch.int32, device="cuda")
    control[(2,)](out, 3, mbarriers, num_warps=4)
    if not torch.equal(out, 3 * torch.arange(256, device=out.device, dtype=out.dtype)):
        raise RuntimeError("the control kernel stored something else than it was told to")
