"""The decode kernels against the decode reference in float64: lengths around every boundary, mixed, any heads."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa import decode_reference  # noqa: E402
from sieve.kernels.nsa.decode import nsa_decode as decode  # noqa: E402
from sieve.kernels.nsa.decode_tiles import DecodeTiles  # noqa: E402
from sieve.kernels.nsa.decode_triton import nsa_decode  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402

TOY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=24)
PAPER = Geometry(32, 16, 64, topk=4, init_blocks=1, local_blocks=2, window_size=100)
COARSE = Geometry(16, 16, 16, topk=3, init_blocks=1, local_blocks=1, window_size=7)
THREE = Geometry(8, 4, 12, topk=5, init_blocks=0, local_blocks=2, window_size=16)  # 3 compressed blocks a block
FINE = Geometry(4, 1, 8, topk=1, init_blocks=0, local_blocks=1, window_size=5)


def draw(lengths, geometry, heads=4, groups=2, d_qk=32, d_v=32, dtype=torch.float32, device="cpu", spare=0, seed=0,
         integers=False):  # fmt: skip
    """Caches of sequences whose query is their last token; what a query does not see is NaN, but for compressed blocks
    that exist already, which the reference multiplies by 0."""
    rng, B, room = torch.Generator().manual_seed(seed), len(lengths), max(lengths) + spare
    slots = -(-(room // geometry.kernel_stride + 1) // 16) * 16

    def make(*shape):
        x = torch.randint(-1, 2, shape, generator=rng) if integers else torch.randn(*shape, generator=rng)
        return x.to(device, dtype)

    case = SimpleNamespace(geometry=geometry, scale=d_qk**-0.5, longest=max(lengths))
    case.query = torch.tensor(lengths, dtype=torch.int32, device=device)[:, None] - 1
    place = torch.arange(geometry.window_size, dtype=torch.int32, device=device)
    case.window_key = (case.query - torch.remainder(case.query - place, geometry.window_size)).clamp(min=-1)
    kv = [make(B, groups, n, d) for n in (slots, room, geometry.window_size) for d in (d_qk, d_v)]
    seen = [torch.arange(slots, device=device) * geometry.kernel_stride + geometry.kernel_size - 1 <= case.query]
    seen += [torch.arange(room, device=device) <= case.query, case.window_key >= 0]
    case.plain = [x.masked_fill(~s[:, None, :, None], 0.0) for x, s in zip(kv, (s for s in seen for _ in range(2)))]
    case.kv = [x.masked_fill(~s[:, None, :, None], math.nan) for x, s in zip(kv, (s for s in seen for _ in range(2)))]
    case.q, case.gates = make(B, 1, heads, d_qk), torch.rand(B, 1, heads, 3, generator=rng).to(device, dtype)
    return case


def ours(case, programs=None, share=16):
    """By default in three parts of each branch, and shares of 16 blocks."""
    heads, d_qk, (_, groups, _, d_v) = case.q.shape[2], case.q.shape[3], case.kv[3].shape
    programs = programs or 3 * case.q.shape[0] * groups
    tiles = DecodeTiles.of(heads // groups, d_qk, d_v, case.q.dtype, case.q.device)
    tiles = replace(tiles, programs=programs, select_programs=programs, share=share)
    return nsa_decode(case.q, *case.kv, case.gates, case.query, case.window_key, case.longest, case.geometry,
                      scale=case.scale, tiles=tiles)  # fmt: skip


def reference(case, dtype=torch.float64):
    tensors = (x.to(dtype) for x in (case.q, *case.plain, case.gates))
    return decode_reference.nsa_decode(*tensors, case.query, case.window_key, case.longest, case.geometry, scale=case.scale)


def importances(case):
    """float64 [B, Hkv, J]: what blocks are chosen by; +inf where forced, -inf in the future."""
    found = []
    choose = decode_reference.rank_blocks

    def keep(q, lse, k_cmp, seen, query, num_blocks, geometry, scale):
        s = torch.einsum("bkgnd,bkcd->bkgnc", q, k_cmp) * scale - lse
        p = s.masked_fill(~seen, -math.inf).exp().sum(2)[:, :, 0]
        padded = torch.nn.functional.pad(p, (geometry.kernel_size // geometry.kernel_stride - 1, 64))
        step = geometry.block_size // geometry.kernel_stride
        found.append(sum(w * padded[..., m : m + step * num_blocks : step] for m, w in enumerate(geometry.overlap)))
        return choose(q, lse, k_cmp, seen, query, num_blocks, geometry, scale)

    decode_reference.rank_blocks = keep
    try:
        reference(case)
    finally:
        decode_reference.rank_blocks = choose
    rank, current = found[0], case.query[:, :, None] // case.geometry.block_size  # [B, 1, 1]
    block = torch.arange(rank.shape[-1], device=rank.device)
    forced = (block < case.geometry.init_blocks) | (block > current - case.geometry.local_blocks)
    return rank.masked_fill(forced, math.inf).masked_fill(block > current, -math.inf)


def check(case, tolerance=1e-5, **options):
    out, indices = ours(case, **options)
    want, chosen = reference(case)
    assert out.shape == want.shape and out.dtype == case.q.dtype and indices.shape == chosen.shape
    if not torch.equal(indices, chosen):  # then by near ties alone, and the outputs are not to be compared
        rank = importances(case)
        for b, h in (indices != chosen).any(-1)[:, 0].nonzero().tolist():
            mine, theirs = (rank[b, h][i[b, 0, h][i[b, 0, h] >= 0].long()] for i in (indices, chosen))
            torch.testing.assert_close(mine.sort().values, theirs.sort().values, rtol=1e-4, atol=1e-12)
            want[b] = out[b].double()
        assert (indices == chosen).all(-1).float().mean() > 0.9
    rtol = tolerance if case.q.dtype == torch.float32 else {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.q.dtype]
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=rtol)
    return out, indices


def around(geometry):
    edges = {geometry.kernel_size, geometry.kernel_stride, geometry.block_size, geometry.window_size}
    edges |= {geometry.topk * geometry.block_size, (geometry.topk + 1) * geometry.block_size, 3 * geometry.kernel_size}
    return sorted({n + off for n in edges for off in (-1, 0, 1)} - {0} | {1, 2, 5 * geometry.topk * geometry.block_size + 3})


@pytest.mark.parametrize("geometry", [TOY, PAPER, COARSE, THREE, FINE], ids=["toy", "paper", "coarse", "three", "fine"])
def test_lengths_around_every_boundary_in_one_batch(geometry, device, poison):
    case = draw(around(geometry), geometry, device=device, heads=3, groups=1, spare=37)
    check(case)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_groups_and_head_dimensions(group, dims, device, poison):
    check(draw([300, 77, 1], TOY, 2 * group, 2, *dims, device=device, dtype=torch.float16, seed=group))


@pytest.mark.parametrize("dims", [(80, 96), (32, 256), (256, 80), (96, 192)], ids=str)
def test_other_head_dimensions(dims, device, poison):
    check(draw([210, 33], TOY, 4, 1, *dims, device=device))


def test_largest_group(device, poison):
    check(draw([200], TOY, 64, 1, 32, 32, device=device))


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_any_number_of_parts(programs, device, poison):
    check(draw([250, 40], TOY, device=device), programs=programs)


@pytest.mark.parametrize("geometry", [TOY, THREE], ids=["toy", "three"])
def test_any_share_chooses_the_same(geometry, device, poison):
    """The last with the size that is taken by default."""
    case = draw([700, 640, 30], geometry, device=device)
    found = [ours(case, share=share) for share in (16, 32, 256, None)]
    check(case, share=256)
    for out, indices in found[1:]:
        assert torch.equal(indices, found[0][1])
        torch.testing.assert_close(out, found[0][0], rtol=1e-5, atol=1e-6)


def test_more_blocks_chosen_than_a_share_has(device, poison):
    case = draw([700, 330, 100], Geometry(8, 4, 16, topk=20, init_blocks=1, local_blocks=2, window_size=24), device=device)
    out, indices = check(case)
    assert (indices[0] >= 0).all() and indices[2, 0, 0].tolist() == [*range(7), *[-1] * 13]


def test_twice_the_same(device, poison):
    case = draw([333, 40], TOY, 16, 2, device=device, dtype=torch.float16)
    (a, i), (b, j) = ours(case), ours(case)
    assert torch.equal(a, b) and torch.equal(i, j)


def test_exact_ties_fall_as_in_the_reference(device, poison):
    """Small integers make scores exact, so that many importances are equal but for the rounding of one sum."""
    case = draw([333, 290, 200], TOY, device=device, integers=True)
    case.scale = 0.5
    _, indices = check(case)
    case.q.zero_()
    _, indices = ours(case)
    assert indices[0, 0].tolist() == [[0, 1, 19, 20]] * 2


def test_room_beyond_the_lengths_changes_nothing_but_rounding(device, poison):
    """Nor does `longest`: an upper bound, as a captured graph has."""
    narrow, wide = (draw([150, 60], TOY, device=device, spare=spare) for spare in (0, 500))
    for x, y in zip(wide.kv, narrow.kv):
        x.fill_(math.nan)[:, :, : y.shape[2]] = y
    wide.q, wide.gates, wide.longest = narrow.q, narrow.gates, 650
    (a, i), (b, j) = ours(narrow), ours(wide)
    assert torch.equal(i, j)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_idle_sequence_gets_something_finite(device, poison):
    """A sequence without new tokens asks at any position up to `longest`; caches are never NaN there."""
    case = draw([100, 30], TOY, device=device)
    case.kv = case.plain
    case.query[1] = 99
    out, indices = ours(case)
    assert out.isfinite().all() and (indices < 7).all() and (indices >= -1).all()


def test_strided_caches_and_the_seam(device, poison, monkeypatch):
    case = draw([120, 90], TOY, device=device, dtype=torch.float16)
    want, indices = ours(case)
    k = torch.stack([case.kv[2], case.kv[2]], 3)[:, :, :, 1]  # every other row
    case.kv[2] = k
    out, chosen = decode(case.q, *case.kv, case.gates, case.query, case.window_key, case.longest, case.geometry,
                         scale=case.scale, impl="triton")  # fmt: skip
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


def test_users_mistakes(device):
    case = draw([60], TOY, d_qk=112, device=device)
    with pytest.raises(ValueError, match="head dimension 112 has no Triton kernel"):
        ours(case)
    case = draw([60], TOY, device=device)
    case.q = case.q.expand(-1, 2, -1, -1)
    with pytest.raises(ValueError, match="has 2 tokens a sequence; the decode kernels take one"):
        ours(case)
