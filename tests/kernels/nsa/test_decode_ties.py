"""A step's choice of blocks is training's to the last bit: made anew in training's order where it hangs by rounding."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from sieve.kernels.nsa.compress_fwd import compressed_attention_fwd  # noqa: E402
from sieve.kernels.nsa.decode_ties import near  # noqa: E402
from sieve.kernels.nsa.decode_tiles import DecodeTiles  # noqa: E402
from sieve.kernels.nsa.decode_triton import launches  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.scores_topk import select_blocks  # noqa: E402

TOY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=12)
THREE = Geometry(8, 4, 12, topk=5, init_blocks=0, local_blocks=2, window_size=16)  # 3 compressed blocks a block
LONG = Geometry(32, 16, 32, topk=3, init_blocks=1, local_blocks=1, window_size=12)  # blocks longer than tiles of queries
PAPER = Geometry(32, 16, 64, 16, 1, 2, 512)


def texts(lengths, geometry, heads, groups, dim, device, dtype, op, dense, d_v=None):
    """Rows of those lengths with the training kernels' choices, and the caches that hold them all at their ends."""
    case, room = SimpleNamespace(chosen=[], scale=dim**-0.5, rows=[], geometry=geometry), max(lengths)
    slots, d_v = (room // geometry.kernel_stride + 17) // 16 * 16, d_v or dim
    places = [slots, slots, room, room, geometry.window_size, geometry.window_size]
    case.kv = [
        torch.zeros(len(lengths), groups, n, d, device=device, dtype=dtype) for n, d in zip(places, (dim, d_v) * 3)
    ]
    for row, length in enumerate(lengths):
        packing = dense.pack([length], device)
        drawn = op.draw(length, heads, groups, dim, d_v, geometry, device, dtype, row)
        q, k_cmp, v_cmp, *rest = (x.detach() for x in drawn)
        _, lse = compressed_attention_fwd(q, k_cmp, v_cmp, packing, geometry, scale=case.scale)
        case.chosen.append(select_blocks(q, k_cmp, lse, packing, geometry, scale=case.scale))
        case.rows.append(q)
        for cache, x in zip(case.kv, (k_cmp, v_cmp, *rest[:2])):
            cache[row, :, : len(x)] = x.transpose(0, 1)
    return case


def step(case, at, margin=None, share=None, programs=None):
    """(choices int32 [B, Hkv, topk], near bool [B, Hkv], out) of the queries at positions `at`, one of each row."""
    q = torch.stack([row[p] for row, p in zip(case.rows, at)])[:, None]
    query = torch.tensor(at, dtype=torch.int32, device=q.device)[:, None]
    groups, d_v = case.kv[3].shape[1], case.kv[3].shape[3]
    tiles = DecodeTiles.of(q.shape[2] // groups, q.shape[3], d_v, q.dtype, q.device)
    tiles = replace(tiles, share=share, margin=tiles.margin if margin is None else margin)
    tiles = tiles if programs is None else replace(tiles, programs=programs, select_programs=programs)
    gates = torch.ones(*q.shape[:3], 3, device=q.device, dtype=q.dtype)
    found = launches(q, *case.kv, gates, query, case.geometry, scale=case.scale, tiles=tiles)
    for call in found.calls.values():
        call()
    return found.index[:, 0], found.near.view(len(at), groups).bool(), found.out


@pytest.mark.parametrize("heads, groups, geometry", [
    (5, 1, LONG), (4, 2, THREE), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(3, 3, TOY), (16, 1, LONG)])
])  # fmt: skip
def test_made_anew_it_is_training_s(heads, groups, geometry, device, op, dense, poison):
    """Every choice that there is, of rows of several lengths, several programs attending for each."""
    lengths = [8, 170, 150]
    case = texts(lengths, geometry, heads, groups, 16, device, torch.float32, op, dense)
    ends = [n - 1 for n in lengths]
    for at in (ends, [0, *(n - 40 for n in lengths[1:])]):
        got, anew, _ = step(case, at, math.inf, programs=6)
        for row, (chosen, p) in enumerate(zip(case.chosen, at)):
            assert torch.equal(got[row], chosen[p]), (row, p)
            assert anew[row].eq(p // geometry.block_size >= geometry.topk).all()
    assert anew.any() and not anew[0].any()


def test_what_is_made_anew_is_what_is_read(device, op, dense, poison):
    """The output is of the same blocks: as without, where both choose alike."""
    case = texts([200, 90], TOY, 4, 2, 16, device, torch.float32, op, dense)
    (chosen, _, out), (anew, all_near, again) = (step(case, [199, 89], margin) for margin in (0.0, math.inf))
    assert torch.equal(chosen, anew) and all_near.all() and torch.equal(out, again)
    before = out
    case.kv[0][0, :, 12:16] = 4 * case.rows[0][199, 0]  # of block 3, which is chosen now
    (chosen, _, out), (anew, _, again) = (step(case, [199, 89], margin) for margin in (0.0, math.inf))
    assert torch.equal(chosen, anew) and torch.equal(out, again) and not torch.equal(out, before)
    assert chosen[0].tolist() == [[0, 3, 11, 12]] * 2


@pytest.mark.parametrize("share", [16, 32])
def test_blocks_that_weigh_the_same(share, device, op, dense, poison):
    """Two blocks of equal keys are near, wherever they lie and however many a share keeps; others are not."""
    case = texts([700], TOY, 4, 1, 16, device, torch.float32, op, dense)
    k, q = case.kv[0], case.rows[0]
    _, anew, _ = step(case, [699], share=share)
    assert not anew.any()
    k.zero_()
    # Blocks 5, 9 and 30, equal and the heaviest but for those that must be chosen, which leave room for one.
    for block in (5, 9, 30):
        k[0, 0, block * 4 : block * 4 + 3] = q[699, 0]
    for at in (699, 640):
        q[at] = q[699]
        chosen, anew, _ = step(case, [at], share=share)
        current = at // 16
        assert anew.all() and chosen[0, 0].tolist() == [0, 5, current - 1, current]


@triton.jit
def asking(least_ptr, most_ptr, lse, margin, out_ptr):
    tl.store(out_ptr, near(tl.load(least_ptr), tl.load(most_ptr), lse, margin).to(tl.int32))


@pytest.mark.parametrize("least, most, lse, want", [
    (1.0, 1.0, 0, True), (1.0, 1.0 - 2**-21, 0, True), (1.0, 1.0 - 2**-18, 0, False), (1.0, 1.0 - 2**-18, 100, True),
    (1e-12, 1e-12 * (1 - 2**-21), 0, True), (1e-12, 1e-12 * (1 - 2**-16), 0, False), (1.0, 0.0, 0, False),
    (0.0, 0.0, 0, True), (1e-35, 1e-37, 0, True), (1e-20, 1e-22, 0, False), (1.0, None, 0, False), (None, 1.0, 0, False),
    (None, None, 0, False),
])  # fmt: skip
def test_near(least, most, lse, want, device):
    """None: nothing is chosen but what must be; nothing is passed over. The faint are looked at more closely."""
    rank = [torch.tensor([x or 0.0], device=device).view(torch.int32) for x in (least, most)]
    if least is None:
        rank[0].fill_(0x7FFFFFFF)
    if most is None:
        rank[1].fill_(-1)
    out = torch.empty(1, dtype=torch.int32, device=device)
    asking[(1,)](*rank, float(lse), 2.0**-23, out)
    assert out.item() == want


@pytest.mark.parametrize("geometry", [TOY, Geometry(16, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=12)])
def test_a_slot_across_two_blocks(geometry, device, op, dense, poison):
    """All that two blocks have: they weigh the same in any order, and the lower is chosen; no longer all, and they are near."""
    case, at = texts([400], geometry, 2, 1, 16, device, torch.float32, op, dense), 399
    k, q = case.kv[0], case.rows[0]
    case.scale = 1.0
    q[at] = 0
    q[at, :, 0] = math.log(2)  # scores in powers of two
    k.zero_()
    k[:, :, :, 0] = -60.0
    k[0, 0, 0, 0] = 0.0
    half = 2 if geometry is not TOY else 3  # counts the same for both blocks
    k[0, 0, 40 + half, 0] = -5.0
    chosen, anew, _ = step(case, [at])
    assert not anew.any() and chosen[0, 0].tolist() == [0, 10, 23, 24]
    k[0, 0, 44, 0] = -5.0 - 25  # of the upper block alone
    chosen, anew, _ = step(case, [at])
    assert anew.all()  # by rounding alone either
    k[0, 0, 44, 0] = -5.0 - 15
    chosen, anew, _ = step(case, [at])
    assert not anew.any() and chosen[0, 0].tolist() == [0, 11, 23, 24]
    k[0, 0, 44, 0] = -60.0
    k[0, 0, 80 + half, 0] = -5.0  # another slot across two
    chosen, anew, _ = step(case, [at])
    assert anew.all() and chosen[0, 0].tolist() == [0, 10, 23, 24]


def test_weights_about_the_smallest(device, op, dense, poison):
    """Where most weights are flushed to zero, a choice is near by the few that nearly are; many zeros alone are not."""
    case = texts([400], TOY, 1, 1, 16, device, torch.float32, op, dense)
    k, q = case.kv[0], case.rows[0]
    case.scale, at = 1.0, 399
    q[at] = 0
    q[at, :, 0] = math.log(2)  # scores in powers of two
    k.zero_()
    k[:, :, :, 0] = -200.0
    k[0, 0, 0, 0] = 0.0
    chosen, anew, _ = step(case, [at])
    assert not anew.any() and chosen[0, 0].tolist() == [0, 1, 23, 24]
    k[0, 0, 40, 0] = -120.0
    chosen, anew, _ = step(case, [at])
    assert not anew.any() and chosen[0, 0].tolist() == [0, 10, 23, 24]
    k[0, 0, 40, 0] = -126.0
    chosen, anew, _ = step(case, [at])
    assert anew.all()
    k[0, 0, 60, 0] = -20.0  # far above
    chosen, anew, _ = step(case, [at])
    assert not anew.any() and chosen[0, 0].tolist() == [0, 15, 23, 24]


@pytest.mark.gpu
@pytest.mark.parametrize("heads, groups, dims, dtype", [
    (64, 4, (128, 128), torch.bfloat16), (16, 4, (128, 128), torch.float16), (64, 4, (192, 128), torch.bfloat16),
    (12, 3, (64, 64), torch.float32), (5, 1, (80, 80), torch.bfloat16), (4, 4, (256, 256), torch.bfloat16),
    (4, 2, (192, 128), torch.float32),
], ids=str)  # fmt: skip
def test_real_sizes(heads, groups, dims, dtype, op, dense):
    """Both made anew, every one of them, and by default, where few are."""
    lengths = [8192, 8001, 5000, 1024]
    case = texts(lengths, PAPER, heads, groups, dims[0], "cuda", dtype, op, dense, dims[1])
    anew, wrong = 0, {}
    for back in range(1, 1000, 3):
        for margin in (math.inf, None):
            got, near_ties, _ = step(case, [n - back for n in lengths], margin)
            differ = sum(int((row != chosen[-back]).any(-1).sum()) for row, chosen in zip(got, case.chosen))
            wrong[margin] = wrong.get(margin, 0) + differ
            anew += int(near_ties.sum()) if margin is None else 0
    print(heads, groups, dims, dtype, "of", 333 * len(lengths) * groups, "choices", anew, "were made anew; different:", wrong)
    assert not any(wrong.values()) and anew < 0.05 * 333 * len(lengths) * groups


def test_warps_that_would_add_otherwise():
    tiles = DecodeTiles.of(4, 64, 64, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="must have 4 warps: others add sums in another order"):
        replace(tiles, select=replace(tiles.select, num_warps=8))
