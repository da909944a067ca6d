"""The Gluon forward of compression on a Hopper GPU, against float64, and against what the Triton kernel promises."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa import compress_fwd  # noqa: E402
from sieve.kernels.nsa.compress_fwd_hopper import compressed_attention_fwd, serves  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402

pytestmark = pytest.mark.gpu
GEOMETRY = Geometry(32, 16, 64, 16, 1, 2, 512)


def draw(tokens, slots, heads, kv_heads, d_qk, d_v, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, d_qk), (slots, kv_heads, d_qk), (slots, kv_heads, d_v)
    return tuple(torch.randn(s, generator=g).to("cuda", dtype) for s in shapes)


CASES = [  # documents, query heads, KV heads, d_qk, d_v, l, d
    ([1], 64, 4, 128, 128, 32, 16),
    ([31], 64, 4, 128, 128, 32, 16),
    ([4099], 64, 4, 128, 128, 32, 16),
    ([2500, 1, 0, 700, 31, 864], 64, 4, 192, 128, 32, 16),
    ([5000], 16, 4, 128, 128, 32, 16),
    ([1500, 47, 600], 16, 8, 64, 64, 64, 16),
    ([900, 100], 64, 1, 96, 32, 8, 4),
    ([157] * 40, 32, 2, 80, 64, 8, 4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_plain_attention(case, dtype, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, l, d = case
    packing, geometry = dense.pack(lengths, "cuda"), Geometry(l, d, 64, 16, 1, 2, 512)
    q, k, v = draw(sum(lengths), sum(lengths) // d, heads, kv_heads, d_qk, d_v, dtype)
    assert serves(q, kv_heads, d_v, geometry)
    scale = d_qk**-0.5
    o, lse = compressed_attention_fwd(q, k, v, packing, geometry, scale=scale)
    seen = dense.nsa_masks(packing, geometry, torch.zeros(len(q), 1, 1, dtype=torch.int32, device="cuda"))[0]
    exact = dense.attend(q.double(), k.double(), v.double(), seen, scale)
    for ours, plain in zip(dense.relative_errors(o, exact), dense.relative_errors(dense.attend(q, k, v, seen, scale), exact)):
        assert ours <= 2 * plain + 1e-6
    wanted = compress_fwd.compressed_attention_fwd(q, k, v, packing, geometry, scale=scale)[1]
    assert torch.equal(lse.isinf(), wanted.isinf()) and torch.allclose(lse, wanted, atol=1e-4)
    assert (o[lse.isinf()] == 0).all()
    again = compressed_attention_fwd(q, k, v, packing, geometry, scale=scale)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)


@pytest.mark.parametrize("slots, stages", [(64, 2), (64, 3), (64, 4), (128, 2)])
def test_every_depth_of_the_pipeline(slots, stages, dense):
    packing = dense.pack([3000], "cuda")
    q, k, v = draw(3000, 187, 64, 4, 128, 128)
    wanted = compress_fwd.compressed_attention_fwd(q, k, v, packing, GEOMETRY, scale=0.1)
    for _ in range(20):
        o, lse = compressed_attention_fwd(q, k, v, packing, GEOMETRY, scale=0.1, slots=slots, stages=stages)
        assert torch.allclose(o, wanted[0], atol=2e-2) and torch.allclose(lse, wanted[1], atol=1e-4)


@pytest.mark.parametrize("first", [16, 1000, 1007])
def test_documents_and_slices_are_independent_bit_for_bit(first, dense):
    q, k, v = draw(3000, 187, 64, 4, 128, 128)
    last = first + 1500
    together = dense.pack([first, 1500, 1500 - first], "cuda")
    o, lse = compressed_attention_fwd(q, k, v, together, GEOMETRY, scale=0.1)
    k1, v1 = (x[first // 16 :][: 1500 // 16].contiguous() for x in (k, v))
    alone = compressed_attention_fwd(q[first:last], k1, v1, dense.pack([1500], "cuda"), GEOMETRY, scale=0.1)
    assert torch.equal(alone[0], o[first:last]) and torch.equal(alone[1], lse[first:last])
    part = replace(together, doc=together.doc[first:last], position=together.position[first:last])
    sliced = compressed_attention_fwd(q[first:last], k, v, part, GEOMETRY, scale=0.1)
    assert torch.equal(sliced[0], o[first:last]) and torch.equal(sliced[1], lse[first:last])


def test_large_logits(dense):
    packing = dense.pack([2048], "cuda")
    q, k, v = draw(2048, 128, 64, 4, 128, 128)
    o, lse = compressed_attention_fwd(10 * q, 10 * k, v, packing, GEOMETRY, scale=0.1)
    assert o.isfinite().all() and torch.equal(lse.isinf()[:, 0], torch.arange(2048, device="cuda") < 31)
