"""The torch operator against the naive float64 loop: outputs, every gradient, and the blocks selected."""

import pytest
import torch

from sieve.kernels.nsa import reference, sdpa
from sieve.kernels.nsa.geometry import Geometry

SMALL = Geometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, init_blocks=1, local_blocks=2, window_size=24)
GEOMETRIES = {
    "l=2d": SMALL,
    "l=d=l'": Geometry(4, 4, 4, 3, 1, 1, 7),
    "l=3d=l'": Geometry(12, 4, 12, 3, 0, 2, 5),
    "l=4d": Geometry(16, 4, 32, 2, 0, 1, 1),
    "paper": Geometry(32, 16, 64, 3, 1, 1, 64),
    "all selected": Geometry(8, 4, 16, 16, 1, 2, 512),
}
PACKED = [5, 0, 1, 33, 0, 64, 1, 0, 50, 7]
IMPLEMENTATIONS = [reference.nsa_attention, sdpa.nsa_attention]
impls = pytest.mark.parametrize("nsa_attention", IMPLEMENTATIONS, ids=["reference", "sdpa"])


def run(nsa_attention, inputs, geometry, **kw):
    """-> indices, [out, every gradient]."""
    out, indices = nsa_attention(*inputs.tensors, inputs.packing, geometry, scale=inputs.scale, **kw)
    return indices, [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent, materialize_grads=True)]


def assert_close(got, want, rtol=1e-9, atol=1e-11):
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


def check(naive, inputs, lengths, geometry):
    want, _, blocks = naive.nsa(*inputs.tensors, lengths, geometry, inputs.scale)
    want = [want, *torch.autograd.grad(want, inputs.tensors, inputs.cotangent, materialize_grads=True)]
    for nsa_attention in IMPLEMENTATIONS:
        indices, got = run(nsa_attention, inputs, geometry)
        assert indices.dtype == torch.int32
        assert torch.equal(indices, naive.padded(blocks, geometry.topk))
        assert_close(got, want)


@pytest.mark.parametrize("lengths", [[1], [31], [32], [33], [200], PACKED], ids=str)
def test_lengths(naive, nsa_inputs, lengths):
    check(naive, nsa_inputs(lengths, SMALL), lengths, SMALL)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(naive, nsa_inputs, name):
    lengths = [30, 150] if name == "paper" else [3, 90, 41]
    check(naive, nsa_inputs(lengths, GEOMETRIES[name], heads=2), lengths, GEOMETRIES[name])


@pytest.mark.parametrize("heads, kv_heads, dim_qk, dim_v", [(2, 2, 4, 4), (4, 2, 4, 8), (6, 2, 12, 8), (3, 1, 2, 1)])
def test_heads(naive, nsa_inputs, heads, kv_heads, dim_qk, dim_v):
    check(naive, nsa_inputs([20, 70], SMALL, heads, kv_heads, dim_qk, dim_v), [20, 70], SMALL)


def test_logits_of_a_hundred(naive, nsa_inputs):
    inputs, lengths = nsa_inputs([90], SMALL, std=6.5), [90]
    assert (inputs.tensors[0][:, 0] @ inputs.tensors[3][:, 0].T * inputs.scale).abs().max() > 100
    _, scores, blocks = naive.nsa(*inputs.tensors, lengths, SMALL, inputs.scale)
    for nsa_attention in IMPLEMENTATIONS:
        indices, got = run(nsa_attention, inputs, SMALL)
        chosen = [[[j for j in row if j >= 0] for row in token] for token in indices.tolist()]
        # A weight of nearly 1 on a block that two selection blocks share makes their importance equal but for rounding.
        for t, row in enumerate(blocks):
            for g, b in enumerate(row):
                got_sum, sum_ = (sum(scores[t][g][j] for j in js) for js in (chosen[t][g], b))
                assert len(chosen[t][g]) == len(b) and got_sum == pytest.approx(sum_, abs=1e-9)
        want, *_ = naive.nsa(*inputs.tensors, lengths, SMALL, inputs.scale, blocks=chosen)
        assert_close(got, [want, *torch.autograd.grad(want, inputs.tensors, inputs.cotangent)])


@impls
def test_equal_keys_choose_the_lowest_blocks(nsa_attention, nsa_inputs):
    geometry = Geometry(4, 4, 4, 4, 1, 1, 7)  # l = d = l': every full block is worth the same
    inputs = nsa_inputs([64, 3, 40], geometry, dtype=torch.float32)
    tensors = [x.detach().clone() for x in inputs.tensors]
    tensors[1][:] = 1.0
    _, indices = nsa_attention(*tensors, inputs.packing, geometry, scale=inputs.scale)
    for t, position in enumerate(inputs.packing.position.tolist()):
        current = position // 4
        want = [*range(min(current, 3)), current]
        want += [-1] * (4 - len(want))
        assert indices[t].tolist() == [want, want], (t, position)


def test_branches_and_their_lse(naive, nsa_inputs):
    q, kc, vc, ks, vs, kw, vw, _ = (inputs := nsa_inputs(PACKED, SMALL)).tensors
    packing, scale = inputs.packing, inputs.scale
    o, lse, _, blocks = naive.compressed(q, kc, vc, PACKED, SMALL, scale)
    indices = naive.padded(blocks, SMALL.topk)
    pairs = [
        ((o, lse), reference.compressed_attention(q, kc, vc, packing, SMALL, scale=scale)),
        (naive.selected(q, ks, vs, blocks, PACKED, SMALL, scale),
         reference.selected_attention(q, ks, vs, indices, packing, SMALL, scale=scale)),
        (naive.attention(q, kw, vw, PACKED, scale, SMALL.window_size),
         reference.window_attention(q, kw, vw, packing, SMALL.window_size, scale=scale)),
    ]
    for wanted, got in pairs:
        for w, g in zip(wanted, got):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    blind = lse == -torch.inf
    assert blind.any() and (pairs[0][1][0][blind] == 0).all()
    assert torch.equal(reference.select_blocks(q, kc, lse, packing, SMALL, scale=scale), indices)


@impls
def test_queries_that_see_no_block_pass_no_nan(nsa_attention, nsa_inputs):
    lengths = [3, 7, 1, 0, 5]  # none as long as a compressed block, and C = 4 slots that hold nothing
    inputs = nsa_inputs(lengths, SMALL)
    out, indices = nsa_attention(*inputs.tensors, inputs.packing, SMALL, scale=inputs.scale)
    grads = torch.autograd.grad(out, inputs.tensors, inputs.cotangent, materialize_grads=True)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (grads[1] == 0).all() and (grads[2] == 0).all()
    assert (indices[..., 0] == 0).all() and (indices[..., 1:] == -1).all()


@pytest.mark.parametrize("lengths", [[3], [1, 1, 1]], ids=str)
def test_fewer_tokens_than_a_stride(naive, nsa_inputs, lengths):
    inputs = nsa_inputs(lengths, SMALL)
    assert inputs.tensors[1].shape[0] == 0
    check(naive, inputs, lengths, SMALL)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunk_only_rounds(nsa_inputs, chunk):
    inputs = nsa_inputs([80, 0, 31], SMALL)
    (a, want), (b, got) = (run(reference.nsa_attention, inputs, SMALL, **kw) for kw in ({}, {"chunk": chunk}))
    assert torch.equal(a, b)
    assert_close(got, want)


def test_the_chunk_of_the_fused_selection_only_rounds(nsa_inputs):
    q, kc, _, ks, vs, *_ = (inputs := nsa_inputs([150, 31], SMALL)).tensors
    _, lse = reference.compressed_attention(q, kc, vs[: kc.shape[0]], inputs.packing, SMALL, scale=inputs.scale)
    indices = reference.select_blocks(q, kc, lse, inputs.packing, SMALL, scale=inputs.scale)
    args = (q, ks, vs, indices, inputs.packing, SMALL)
    a, b = (sdpa.selected_attention(*args, scale=inputs.scale, chunk=c) for c in (16, 512))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert_close(*(torch.autograd.grad(x, (q, ks, vs), inputs.cotangent) for x in (a, b)))


@impls
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)])
def test_dtypes(nsa_attention, nsa_inputs, dtype, tolerance):
    low = nsa_inputs([100, 40], SMALL, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low.tensors]
    got, chosen = nsa_attention(*low.tensors, low.packing, SMALL, scale=low.scale)
    want, wanted = reference.nsa_attention(*exact, low.packing, SMALL, scale=low.scale)
    assert got.dtype == dtype and torch.equal(chosen, wanted)
    grads = torch.autograd.grad(got, low.tensors, low.cotangent)
    wants = torch.autograd.grad(want, exact, low.cotangent.double())
    for g, w in zip((got, *grads), (want, *wants)):
        assert g.dtype == dtype
        # Half inputs are computed in fp32, so the error is the last rounding's.
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)
