"""The Hopper kernel over runs of keys on a GPU, against float64, and against what the Triton kernels promise."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa import compress_fwd, compress_tiles, window_fwd  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.runs_launch import attend, attend_dq, serves  # noqa: E402
from sieve.kernels.nsa.window_tiles import Tile  # noqa: E402

pytestmark = pytest.mark.gpu
GEOMETRY = Geometry(32, 16, 64, 16, 1, 2, 512)
TRITON = compress_tiles.Tile(128, 64, 8, 2)  # naming a tile asks for the Triton kernel


def draw(tokens, keys, heads, kv_heads, d_qk, d_v, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, d_qk), (keys, kv_heads, d_qk), (keys, kv_heads, d_v)
    return tuple(torch.randn(s, generator=g).to("cuda", dtype) for s in shapes)


def compressed(q, k, v, packing, geometry=GEOMETRY, **options):
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    attend(q, k, v, packing, o, lse, scale=0.1, geometry=geometry, **options)
    return o, lse


def windowed(q, k, v, packing, window, **options):
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    attend(q, k, v, packing, o, lse, scale=0.1, window=window, **options)
    return o, lse


def as_exact_as_plain(o, q, k, v, seen, dense):
    exact = dense.attend(q.double(), k.double(), v.double(), seen, 0.1)
    for ours, plain in zip(dense.relative_errors(o, exact), dense.relative_errors(dense.attend(q, k, v, seen, 0.1), exact)):
        assert ours <= 2 * plain + 1e-6


CASES = [  # documents, query heads, KV heads, d_qk, d_v, l, d, window
    ([1], 64, 4, 128, 128, 32, 16, 512),
    ([31], 64, 4, 128, 128, 32, 16, 1),
    ([2051], 64, 4, 128, 128, 32, 16, 512),
    ([900, 1, 0, 500, 31, 264], 64, 4, 192, 128, 32, 16, 300),
    ([3000], 16, 4, 128, 128, 32, 16, 64),
    ([1500, 47, 600], 16, 8, 64, 64, 64, 16, 5000),
    ([900, 100], 64, 1, 96, 32, 8, 4, 100),
    ([57] * 40, 32, 2, 80, 64, 8, 4, 63),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compression_matches_plain_attention(case, dtype, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, l, d, _ = case
    packing, geometry = dense.pack(lengths, "cuda"), Geometry(l, d, 64, 16, 1, 2, 512)
    q, k, v = draw(sum(lengths), max(sum(lengths) // d, 1), heads, kv_heads, d_qk, d_v, dtype)
    assert serves(q, kv_heads, d_v, geometry)
    o, lse = compressed(q, k, v, packing, geometry)
    seen = dense.nsa_masks(packing, geometry, torch.zeros(len(q), 1, 1, dtype=torch.int32, device="cuda"))[0]
    as_exact_as_plain(o, q, k[: seen.shape[-1]], v[: seen.shape[-1]], seen, dense)
    wanted = compress_fwd.compressed_attention_fwd(q, k, v, packing, geometry, scale=0.1, tile=TRITON)[1]
    assert torch.equal(lse.isinf(), wanted.isinf()) and torch.allclose(lse, wanted, atol=1e-4)
    assert (o[lse.isinf()] == 0).all()
    again = compressed(q, k, v, packing, geometry)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_window_matches_plain_attention(case, dtype, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, _, _, window = case
    packing = dense.pack(lengths, "cuda")
    q, k, v = draw(sum(lengths), sum(lengths), heads, kv_heads, d_qk, d_v, dtype)
    assert serves(q, kv_heads, d_v)
    o, lse = windowed(q, k, v, packing, window)
    as_exact_as_plain(o, q, k, v, dense.window_mask(packing, window), dense)
    wanted = window_fwd.window_attention_fwd(q, k, v, packing, window, scale=0.1, tile=Tile(64, 64, 4, 2))[1]
    assert torch.allclose(lse, wanted, atol=1e-4)
    again = windowed(q, k, v, packing, window)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)


@pytest.mark.parametrize("keep", [True, False])
def test_gated_sum(keep, dense, poison):
    packing = dense.pack([700, 324], "cuda")
    q, k, v = draw(1024, 1024, 16, 2, 128, 64)
    o_cmp, o_slc, gates = (torch.randn(1024, 16, n, device="cuda", dtype=torch.bfloat16) for n in (64, 64, 3))
    out, o_win = torch.full_like(o_cmp, float("nan")), torch.full_like(o_cmp, float("nan"))
    lse = torch.empty(1024, 16, device="cuda")
    gated = o_cmp, o_slc, gates.transpose(0, 1).contiguous().transpose(0, 1), out
    attend(q, k, v, packing, o_win if keep else None, lse, scale=0.1, window=100, gated=gated)
    alone, _ = windowed(q, k, v, packing, 100)
    assert not keep or torch.equal(alone, o_win)
    parts = zip(gates.double().unbind(2), (o_cmp, o_slc, alone))
    assert dense.relative_errors(out, sum(g[:, :, None] * x.double() for g, x in parts))[0] < 4e-3


@pytest.mark.parametrize("keys, stages", [(64, 2), (64, 3), (64, 4), (128, 2)])
def test_every_depth_of_the_pipeline(keys, stages, dense):
    packing = dense.pack([3000], "cuda")
    q, k, v = draw(3000, 3000, 64, 4, 128, 128)
    slots = k[:187].contiguous(), v[:187].contiguous()
    wanted = compress_fwd.compressed_attention_fwd(q, *slots, packing, GEOMETRY, scale=0.1, tile=TRITON)
    near = window_fwd.window_attention_fwd(q, k, v, packing, 512, scale=0.1, tile=Tile(64, 64, 4, 2))
    for _ in range(20):
        for got, want in (
            (compressed(q, *slots, packing, keys=keys, stages=stages), wanted),
            (windowed(q, k, v, packing, 512, keys=keys, stages=stages), near),
        ):
            assert torch.allclose(got[0], want[0], atol=2e-2) and torch.allclose(got[1], want[1], atol=1e-4)


@pytest.mark.parametrize("first", [16, 1000, 1007])
def test_documents_and_slices_are_independent_bit_for_bit(first, dense):
    q, k, v = draw(3000, 187, 64, 4, 128, 128)
    last = first + 1500
    together = dense.pack([first, 1500, 1500 - first], "cuda")
    o, lse = compressed(q, k, v, together)
    k1, v1 = (x[first // 16 :][: 1500 // 16].contiguous() for x in (k, v))
    alone = compressed(q[first:last], k1, v1, dense.pack([1500], "cuda"))
    assert torch.equal(alone[0], o[first:last]) and torch.equal(alone[1], lse[first:last])
    part = replace(together, doc=together.doc[first:last], position=together.position[first:last])
    sliced = compressed(q[first:last], k, v, part)
    assert torch.equal(sliced[0], o[first:last]) and torch.equal(sliced[1], lse[first:last])


def test_a_slice_of_the_window_branch(dense):
    packing = dense.pack([1500, 1500], "cuda")
    q, k, v = draw(3000, 3000, 64, 4, 128, 128)
    o, lse = windowed(q, k, v, packing, 512)
    part = replace(packing, doc=packing.doc[1024:], position=packing.position[1024:])
    sliced = windowed(q[1024:], k, v, part, 512, first_token=1024)
    assert torch.equal(sliced[0], o[1024:]) and torch.equal(sliced[1], lse[1024:])


def test_large_logits(dense):
    packing = dense.pack([2048], "cuda")
    q, k, v = draw(2048, 2048, 64, 4, 128, 128)
    o, lse = compressed(10 * q, 10 * k[:128].contiguous(), v[:128].contiguous(), packing)
    assert o.isfinite().all() and torch.equal(lse.isinf()[:, 0], torch.arange(2048, device="cuda") < 31)
    o, lse = windowed(10 * q, 10 * k, v, packing, 512)
    assert o.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("branch", ["compression", "window"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dq_matches_plain_attention(case, branch, add, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, l, d, window = case
    packing, geometry = dense.pack(lengths, "cuda"), Geometry(l, d, 64, 16, 1, 2, 512)
    tokens = sum(lengths)
    q, k, v = draw(tokens, max(tokens // d, 1) if branch == "compression" else tokens, heads, kv_heads, d_qk, d_v)
    do, before = torch.randn_like(q[..., :1].expand(-1, -1, d_v)), torch.randn_like(q)
    if branch == "compression":
        seen = dense.nsa_masks(packing, geometry, torch.zeros(tokens, 1, 1, dtype=torch.int32, device="cuda"))[0]
        seen = torch.nn.functional.pad(seen, (0, k.shape[0] - seen.shape[-1]))
        options = {"geometry": geometry}
        o, lse = compressed(q, k, v, packing, geometry)
    else:
        seen, options = dense.window_mask(packing, window), {"window": window}
        o, lse = windowed(q, k, v, packing, window)
    delta = (o.float() * do.float()).sum(-1)

    def ours():
        dq = before.clone() if add else torch.full_like(q, float("nan"))
        attend_dq(do, q, k, v, lse, delta, packing, dq, scale=0.1, add=add, **options)
        return dq

    def plain(dtype):
        x = q.to(dtype, copy=True).requires_grad_()
        grad = torch.autograd.grad(dense.attend(x, k.to(dtype), v.to(dtype), seen, 0.1), x, do.to(dtype))[0]
        return grad + before if add else grad

    exact = plain(torch.float64)
    floor = 1e-6 if exact.any() else 1e-4  # of a row that sees one key: the difference of two equal sums
    for mine, theirs in zip(dense.relative_errors(ours(), exact), dense.relative_errors(plain(q.dtype), exact)):
        assert mine <= 2 * theirs + floor
    assert torch.equal(ours(), ours())
