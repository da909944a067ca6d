"""Sliding-window kernels against plain attention in float64: outputs, every gradient, odd shapes, promises."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa.window_bwd import window_dkv, window_dq  # noqa: E402
from sieve.kernels.nsa.window_fwd import window_attention_fwd  # noqa: E402
from sieve.kernels.nsa.window_tiles import Tile  # noqa: E402

SMALL = Tile(32, 16, 4, 1)


def draw(tokens, heads, kv_heads, d_qk, d_v, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, d_qk), (tokens, kv_heads, d_qk), (tokens, kv_heads, d_v), (tokens, heads, d_v)
    return tuple(torch.randn(s, generator=g).to(device, dtype) for s in shapes)


def run(q, k, v, do, packing, width, tile=None):
    scale = q.shape[2] ** -0.5
    o, lse = window_attention_fwd(q, k, v, packing, width, scale=scale, tile=tile)
    delta = (o.float() * do.float()).sum(-1)
    dq = window_dq(do, q, k, v, lse, delta, packing, width, scale=scale, tile=tile)
    dk, dv = window_dkv(do, q, k, v, lse, delta, packing, width, scale=scale, tile=tile)
    return o, lse, dq, dk, dv


def plain(q, k, v, do, packing, width, dense, dtype):
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (q, k, v))
    o = dense.attend(q, k, v, dense.window_mask(packing, width), q.shape[2] ** -0.5)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(dtype))


CASES = [  # documents, query heads, KV heads, d_qk, d_v, window
    ([37], 4, 2, 32, 32, 16),
    ([1], 3, 1, 32, 64, 5),
    ([13, 0, 21, 1, 9], 6, 2, 80, 96, 7),
    ([70], 7, 1, 32, 32, 48),
    ([25, 11], 12, 1, 32, 32, 24),
    ([33], 2, 2, 32, 32, 1000),
    ([20, 3], 5, 1, 192, 128, 1),
    ([10], 64, 1, 32, 256, 8),
    ([2] * 12, 4, 4, 32, 32, 3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_plain_attention(case, device, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, width = case
    packing = dense.pack(lengths, device)
    inputs = draw(sum(lengths), heads, kv_heads, d_qk, d_v, device)
    tile = Tile(64, 32, 4, 1) if heads > 6 else SMALL  # the interpreter takes a time a tile
    o, lse, *grads = run(*inputs, packing, width, tile)
    exact = plain(*inputs, packing, width, dense, torch.float64)
    for got, want in zip((o, *grads), exact):
        assert torch.allclose(got.double(), want, atol=2e-5, rtol=1e-5), dense.relative_errors(got, want)
    q, k = inputs[:2]
    s = torch.einsum("tkgd,nkd->tkgn", q.double().unflatten(1, (kv_heads, -1)), k.double()) * d_qk**-0.5
    s = s.masked_fill(~dense.window_mask(packing, width)[:, :, None], float("-inf"))
    assert torch.allclose(lse.double(), s.logsumexp(-1).flatten(1), atol=1e-5)


def test_default_tiles_and_half_precision(device, dense, poison):
    packing = dense.pack([60, 25], device)
    inputs = draw(85, 4, 2, 64, 32, device, torch.float16)
    o, _, *grads = run(*inputs, packing, 30)
    exact = plain(*inputs, packing, 30, dense, torch.float64)
    for got, want in zip((o, *grads), exact):
        assert dense.relative_errors(got, want)[0] < 2e-3


def test_strided_inputs(device, dense, poison):
    packing = dense.pack([13, 10], device)
    q, k, v, do = draw(23, 4, 2, 32, 32, device)
    want = run(q, k, v, do, packing, 9, SMALL)
    apart = [torch.stack([x, x], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1] for x in (q, k, v)]
    across = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]  # last stride not 1
    for q, k, v in (apart, across):
        for got, exact in zip(run(q, k, v, do, packing, 9, SMALL), want):
            assert torch.equal(got, exact)


def test_slices_are_bit_equal(device, dense):
    packing = dense.pack([20, 28], device)
    q, k, v, _ = draw(48, 4, 2, 32, 32, device)
    o, lse = window_attention_fwd(q, k, v, packing, 20, scale=0.2, tile=SMALL)
    for first in (0, 16, 32):
        part = window_attention_fwd(q[first : first + 16], k, v, packing, 20, scale=0.2, first_token=first, tile=SMALL)
        assert torch.equal(part[0], o[first : first + 16]) and torch.equal(part[1], lse[first : first + 16])


def test_causal_and_isolated_bit_for_bit(device, dense):
    """Neither later tokens, nor tokens beyond the window, nor other documents move a bit of an output."""
    packing = dense.pack([20, 30], device)
    q, k, v, _ = draw(50, 4, 2, 32, 32, device)
    o, lse = window_attention_fwd(q, k, v, packing, 8, scale=0.2, tile=SMALL)
    for hidden, same in ((slice(35, 50), slice(0, 35)), (slice(0, 20), slice(20, 50)), (slice(0, 25), slice(32, 50))):
        k2, v2 = k.clone(), v.clone()
        k2[hidden], v2[hidden] = 7.0, -9.0
        o2, lse2 = window_attention_fwd(q, k2, v2, packing, 8, scale=0.2, tile=SMALL)
        assert torch.equal(o2[same], o[same]) and torch.equal(lse2[same], lse[same])


def test_batch_invariant_at_tile_boundaries(device, dense):
    """A document's results do not depend on what surrounds it, if it begins where a tile of rows and one of keys do."""
    q, k, v, do = draw(48, 4, 2, 32, 32, device)
    alone = run(q[16:36], k[16:36], v[16:36], do[16:36], dense.pack([20], device), 6, SMALL)
    together = run(q, k, v, do, dense.pack([16, 20, 12], device), 6, SMALL)
    for a, b in zip(alone, together):
        assert torch.equal(a, b[16:36])


def test_large_logits_and_ties(device, dense, poison):
    packing = dense.pack([40], device)
    q, k, v, do = draw(40, 2, 1, 32, 32, device)
    for inputs in ((q * 10, k * 10, v, do), (q, torch.ones_like(k), v, do)):
        got = run(*inputs, packing, 24, SMALL)
        exact = plain(*inputs, packing, 24, dense, torch.float64)
        for a, b in zip((got[0], *got[2:]), exact):
            assert torch.allclose(a.double(), b, atol=1e-3, rtol=1e-4)


def test_a_lowered_lse_scales_the_gradients(device, dense):
    """What gates rely on: lse - log g gives g times the gradients."""
    packing = dense.pack([30], device)
    q, k, v, do = draw(30, 2, 1, 32, 32, device)
    o, lse, *grads = run(q, k, v, do, packing, 8, SMALL)
    delta = (o * do).sum(-1)
    shifted = lse - torch.tensor(0.25, device=device).log()
    base = torch.ones_like(q)
    dq = window_dq(do, q, k, v, shifted, delta, packing, 8, scale=32**-0.5, dq=base.clone(), tile=SMALL)
    dk, dv = window_dkv(do, q, k, v, shifted, delta, packing, 8, scale=32**-0.5, tile=SMALL)
    for got, want in zip((dq - base, dk, dv), grads):
        assert torch.allclose(got, 0.25 * want, atol=1e-5)


SHAPES = [  # query heads, KV heads, d_qk, d_v
    (16, 1, 128, 128), (32, 2, 192, 128), (4, 1, 64, 64), (12, 1, 80, 96), (2, 1, 256, 256), (8, 8, 32, 256),
    (5, 1, 128, 192),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_errors_are_those_of_half_precision(shape, dtype, dense, poison):
    packing = dense.pack([700, 1, 0, 300, 535], "cuda")
    inputs = draw(1536, *shape, "cuda", dtype)
    o, _, *grads = run(*inputs, packing, 200)
    exact = plain(*inputs, packing, 200, dense, torch.float64)
    yardstick = plain(*inputs, packing, 200, dense, dtype)
    for name, got, bf16, want in zip(("o", "dq", "dk", "dv"), (o, *grads), yardstick, exact):
        for ours, theirs in zip(dense.relative_errors(got, want), dense.relative_errors(bf16, want)):
            assert ours <= 2 * theirs, (name, ours, theirs)


@pytest.mark.gpu
def test_gpu_runs_are_bit_equal(dense):
    packing = dense.pack([3000, 1096], "cuda")
    inputs = draw(4096, 32, 2, 128, 128, "cuda", torch.bfloat16)
    first = run(*inputs, packing, 512)
    for _ in range(3):
        for a, b in zip(first, run(*inputs, packing, 512)):
            assert torch.equal(a, b)
