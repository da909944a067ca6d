"""Compression kernels against plain attention in float64: outputs, every gradient, odd shapes, promises."""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa.compress_bwd import compressed_attention_bwd  # noqa: E402
from sieve.kernels.nsa.compress_dkv import compressed_dkv  # noqa: E402
from sieve.kernels.nsa.compress_dq import compressed_dq  # noqa: E402
from sieve.kernels.nsa.compress_fwd import compressed_attention_fwd  # noqa: E402
from sieve.kernels.nsa.compress_tiles import Tile  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.layout import Packing  # noqa: E402

SMALL = Tile(64, 16, 4, 1)


def geometry(kernel_size, kernel_stride, block_size=None, topk=4):
    return Geometry(kernel_size, kernel_stride, block_size or 2 * kernel_size, topk, 1, 2, 16)


def draw(tokens, slots, heads, kv_heads, d_qk, d_v, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, d_qk), (slots, kv_heads, d_qk), (slots, kv_heads, d_v), (tokens, heads, d_v)
    return tuple(torch.randn(s, generator=g).to(device, dtype) for s in shapes)


def run(q, k, v, do, packing, geo, tile=None, splits=None):
    scale = q.shape[2] ** -0.5
    o, lse = compressed_attention_fwd(q, k, v, packing, geo, scale=scale, tile=tile)
    delta = (o.float() * do.float()).sum(-1)
    dq = torch.empty_like(q)
    compressed_dq(do, q, k, v, lse, delta, packing, geo, scale=scale, dq=dq, add=False, tile=tile)
    dk, dv = compressed_dkv(do, q, k, v, lse, delta, packing, geo, scale=scale, tile=tile, splits=splits)
    return o, lse, dq, dk, dv


def plain(q, k, v, do, packing, geo, dense, dtype):
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (q, k, v))
    seen = dense.nsa_masks(packing, geo, torch.zeros(q.shape[0], 1, 1, dtype=torch.int32, device=q.device))[0]
    o = dense.attend(q, k, v, seen, q.shape[2] ** -0.5)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(dtype))


CASES = [  # documents, query heads, KV heads, d_qk, d_v, l, d
    ([60], 4, 2, 32, 32, 4, 2),
    ([1], 3, 1, 32, 64, 1, 1),
    ([13, 0, 21, 1, 9], 6, 2, 80, 96, 4, 2),
    ([30], 7, 1, 32, 32, 6, 2),
    ([17, 20], 12, 1, 32, 32, 2, 2),
    ([12], 2, 2, 32, 32, 8, 8),
    ([14, 3], 5, 1, 192, 128, 2, 1),
    ([10], 64, 1, 32, 256, 3, 1),
    ([1, 2, 3, 4] * 10, 2, 2, 32, 32, 2, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_plain_attention(case, device, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, l, d = case
    packing, geo = dense.pack(lengths, device), geometry(l, d)
    inputs = draw(sum(lengths), sum(lengths) // d, heads, kv_heads, d_qk, d_v, device)
    o, lse, *grads = run(*inputs, packing, geo, SMALL, splits=2)
    exact = plain(*inputs, packing, geo, dense, torch.float64)
    for got, want in zip((o, *grads), exact):
        assert torch.allclose(got.double(), want, atol=2e-5, rtol=1e-5), dense.relative_errors(got, want)
    q, k = inputs[:2]
    seen = dense.nsa_masks(packing, geo, torch.zeros(len(q), 1, 1, dtype=torch.int32, device=device))[0]
    s = torch.einsum("tkgd,nkd->tkgn", q.double().unflatten(1, (kv_heads, -1)), k.double()) * d_qk**-0.5
    s = s.masked_fill(~seen[:, :, None], float("-inf")).logsumexp(-1).flatten(1)
    assert torch.allclose(lse.double(), s, atol=1e-5)
    blind = ~seen.any(-1).squeeze(1)
    assert (o[blind] == 0).all() and (lse[blind] == float("-inf")).all() and (grads[0][blind] == 0).all()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_slot_at_all(tokens, device, poison):
    packing = Packing.of(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, tokens)
    inputs = draw(tokens, tokens // 8, 4, 2, 32, 32, device)
    o, lse, dq, dk, dv = run(*inputs, packing, geometry(16, 8))
    assert o.shape == inputs[3].shape and (o == 0).all() and (lse == float("-inf")).all() and (dq == 0).all()
    assert dk.shape == inputs[1].shape and dv.shape == inputs[2].shape


def test_default_tiles_and_half_precision(device, dense, poison):
    packing, geo = dense.pack([60, 25], device), geometry(4, 2)
    inputs = draw(85, 42, 4, 2, 64, 32, device, torch.float16)
    o, _, *grads = run(*inputs, packing, geo)
    for got, want in zip((o, *grads), plain(*inputs, packing, geo, dense, torch.float64)):
        assert dense.relative_errors(got, want)[0] < 2e-3


def test_unused_slots_change_nothing(device, dense):
    """A document's slots past its last whole block hold anything finite, and get no gradient."""
    packing, geo = dense.pack([13, 18], device), geometry(8, 2)
    q, k, v, do = draw(31, 15, 4, 2, 32, 32, device)
    unused = torch.tensor([3, 4, 5, 12, 13, 14], device=device)
    want = run(q, k, v, do, packing, geo, SMALL)
    k[unused], v[unused] = 1e3, -1e3
    got = run(q, k, v, do, packing, geo, SMALL)
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    assert (got[3][unused] == 0).all() and (got[4][unused] == 0).all()


def test_strided_inputs(device, dense, poison):
    packing, geo = dense.pack([13, 10], device), geometry(4, 2)
    q, k, v, do = draw(23, 11, 4, 2, 32, 32, device)
    want = run(q, k, v, do, packing, geo, SMALL)
    apart = [torch.stack([x, x], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1] for x in (q, k, v, do)]
    across = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v, do)]  # last stride not 1
    for inputs in (apart, across):
        for got, exact in zip(run(*inputs, packing, geo, SMALL)[:2], want):
            assert torch.equal(got, exact)
    scale, delta = 32**-0.5, (want[0] * do).sum(-1)
    for q, k, v, do in (apart, across):
        dk, dv = compressed_dkv(do, q, k, v, want[1], delta, packing, geo, scale=scale, tile=SMALL)
        assert torch.equal(dk, want[3]) and torch.equal(dv, want[4])


def part_of(packing, at):
    return replace(packing, doc=packing.doc[at], position=packing.position[at])


def test_slices_are_bit_equal(device, dense):
    packing, geo = dense.pack([20, 28], device), geometry(4, 2)
    q, k, v, _ = draw(48, 24, 4, 2, 32, 32, device)
    o, lse = compressed_attention_fwd(q, k, v, packing, geo, scale=0.2, tile=SMALL)
    for at in (slice(0, 32), slice(32, 48)):
        part = compressed_attention_fwd(q[at], k, v, part_of(packing, at), geo, scale=0.2, tile=SMALL)
        assert torch.equal(part[0], o[at]) and torch.equal(part[1], lse[at])


def test_causal_and_isolated_bit_for_bit(device, dense):
    """Neither blocks that end later than a query nor other documents' move a bit of its output."""
    packing, geo = dense.pack([20, 30], device), geometry(4, 2)
    q, k, v, _ = draw(50, 25, 4, 2, 32, 32, device)
    o, lse = compressed_attention_fwd(q, k, v, packing, geo, scale=0.2, tile=SMALL)
    # Slot 10 + i holds the tokens 20 + 2 i .. 20 + 2 i + 3.
    for hidden, same in ((slice(17, 25), slice(0, 37)), (slice(0, 10), slice(20, 50)), (slice(10, 25), slice(0, 20))):
        k2, v2 = k.clone(), v.clone()
        k2[hidden], v2[hidden] = 7.0, -9.0
        o2, lse2 = compressed_attention_fwd(q, k2, v2, packing, geo, scale=0.2, tile=SMALL)
        assert torch.equal(o2[same], o[same]) and torch.equal(lse2[same], lse[same])


def check_batch_invariance(first, device, dense, tile, dtype=torch.float32):
    """o, lse and dq of a document do not depend on what is packed around it."""
    geo, last = geometry(4, 2), first + 20
    q, k, v, do = draw(60, 30, 4, 2, 32, 32, device, dtype)
    slots = slice(first // 2, last // 2)
    alone = run(q[first:last], k[slots], v[slots], do[first:last], dense.pack([20], device), geo, tile)
    together = run(q, k, v, do, dense.pack([first, 20, 40 - first], device), geo, tile)
    for a, b in zip(alone[:3], together[:3]):
        assert torch.equal(a, b[first:last])


def test_batch_invariant(device, dense):
    check_batch_invariance(32, device, dense, SMALL)  # numpy's products depend on where in a tile a row stands


@pytest.mark.gpu
@pytest.mark.parametrize("first", [2, 14, 36])
def test_batch_invariant_anywhere(first, dense):
    check_batch_invariance(first, "cuda", dense, None, torch.bfloat16)


def test_large_logits_and_equal_keys(device, dense, poison):
    packing, geo = dense.pack([40], device), geometry(4, 2)
    q, k, v, do = draw(40, 20, 2, 1, 32, 32, device)
    for inputs in ((q * 10, k * 10, v, do), (q, torch.ones_like(k), v, do)):
        o, _, *grads = run(*inputs, packing, geo, SMALL)
        for got, want in zip((o, *grads), plain(*inputs, packing, geo, dense, torch.float64)):
            assert torch.allclose(got.double(), want, atol=1e-4, rtol=1e-4)


def test_gates_in_the_exponent_and_added_dq(device, dense):
    """lse - log(gate) stands for gate * do, +inf for a gate of 0; dq is added to what is there."""
    packing, geo = dense.pack([24, 9], device), geometry(4, 2)
    q, k, v, do = draw(33, 16, 3, 1, 32, 32, device)
    gate = torch.rand(33, 3, generator=torch.Generator().manual_seed(1)).to(device)
    gate[5:9] = 0.0
    want = run(q, k, v, do * gate[..., None], packing, geo, SMALL)
    shifted = torch.where(want[1] == float("-inf"), want[1], want[1] - gate.log())
    dq = torch.ones_like(q)
    dk, dv = compressed_attention_bwd(
        do, q, k, v, shifted, (want[0] * do).sum(-1), packing, geo, scale=32**-0.5, dq=dq
    )
    for got, exact in zip((dq - 1, dk, dv), want[2:]):
        assert torch.allclose(got, exact, atol=2e-5)


def test_runs_repeat_and_splits_agree(device, dense, poison):
    packing, geo = dense.pack([40, 7], device), geometry(4, 2)
    inputs = draw(47, 23, 4, 2, 32, 32, device)
    first, again, cut = (run(*inputs, packing, geo, SMALL, splits=n) for n in (3, 3, 1))
    for a, b, c in zip(first, again, cut):
        assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-5)


def test_scale_and_dims_are_checked(device, dense):
    packing, geo = dense.pack([20], device), geometry(4, 2)
    q, k, v, _ = draw(20, 10, 2, 1, 24, 32, device)
    with pytest.raises(ValueError, match="head dimension 24"):
        compressed_attention_fwd(q, k, v, packing, geo, scale=1.0)


REAL = [  # documents, query heads, KV heads, d_qk, d_v, l, d
    ([4096], 64, 4, 128, 128, 32, 16),
    ([2500, 1, 0, 700, 31, 864], 64, 4, 192, 128, 32, 16),
    ([2049], 16, 4, 128, 128, 32, 16),
    ([1500, 47], 12, 4, 80, 96, 32, 16),
    ([1030], 7, 1, 64, 256, 16, 8),
    ([900, 100], 64, 1, 96, 32, 64, 16),
    ([1100], 5, 5, 256, 256, 32, 32),
    ([57] * 40, 10, 2, 128, 128, 4, 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_on_the_gpu(case, dtype, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, l, d = case
    packing, geo = dense.pack(lengths, "cuda"), geometry(l, d)
    inputs = draw(sum(lengths), sum(lengths) // d, heads, kv_heads, d_qk, d_v, "cuda", dtype)
    o, lse, *grads = run(*inputs, packing, geo)
    exact = plain(*inputs, packing, geo, dense, torch.float64)
    yardstick = plain(*inputs, packing, geo, dense, dtype)
    for got, want, same in zip((o, *grads), exact, yardstick):
        for ours, theirs in zip(dense.relative_errors(got, want), dense.relative_errors(same, want)):
            assert ours <= 2 * theirs + 2e-6  # fp32: exp2 is good to 2 ulp
    again = run(*inputs, packing, geo)
    for a, b in zip((o, lse, *grads), again):
        assert torch.equal(a, b)
