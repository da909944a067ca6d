"""The selection kernel against equation 9 in float64: which blocks, in what order, and what must not move them."""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa import reference  # noqa: E402
from sieve.kernels.nsa.compress_tiles import Tile  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.layout import Packing  # noqa: E402
from sieve.kernels.nsa.scores_topk import select_blocks  # noqa: E402

SMALL = Tile(128, 32, 4, 1)


def draw(tokens, slots, heads, kv_heads, d_qk, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(device, dtype) for s in ((tokens, heads, d_qk), (slots, kv_heads, d_qk)))


def exact_lse(q, k, packing, geometry, scale):
    return reference.compressed_attention(q.double(), k.double(), k.double(), packing, geometry, scale=scale)[1]


CASES = [  # documents, query heads, KV heads, d_qk, (l, d, l', n, initial, local)
    ([130], 6, 2, 48, (8, 4, 16, 4, 1, 2)),
    ([37, 0, 1, 90], 2, 2, 32, (8, 4, 16, 4, 1, 2)),
    ([120, 60], 3, 1, 80, (8, 8, 32, 2, 1, 1)),
    ([3] * 20 + [70], 5, 1, 32, (4, 4, 4, 3, 0, 2)),
    ([90], 4, 1, 32, (8, 4, 12, 5, 1, 2)),  # 3 slots a block
    ([70], 4, 1, 192, (4, 1, 8, 3, 0, 1)),  # 4 strides a slot
    ([60], 7, 1, 32, (2, 2, 4, 1, 0, 1)),
    ([16], 64, 1, 32, (2, 1, 2, 64, 1, 2)),  # more places than blocks
    ([30], 12, 1, 256, (8, 2, 8, 2, 1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chooses_by_equation_9(case, device, dense, poison):
    lengths, heads, kv_heads, d_qk, sizes = case
    packing, geometry, scale = dense.pack(lengths, device), Geometry(*sizes, 16), d_qk**-0.5
    q, k = draw(sum(lengths), sum(lengths) // geometry.kernel_stride, heads, kv_heads, d_qk, device)
    lse = exact_lse(q, k, packing, geometry, scale)
    indices = select_blocks(q, k, lse.float(), packing, geometry, scale=scale, tile=SMALL)
    assert indices.dtype == torch.int32 and indices.shape == (sum(lengths), kv_heads, geometry.topk)
    dense.check_selection(indices, q, k, lse, packing, geometry, scale, 1e-5)
    wanted = reference.select_blocks(q, k, lse, packing, geometry, scale=scale)
    assert (indices == wanted).all(-1).float().mean() > 0.97  # beyond ties within rounding


def test_ties_go_to_the_lower_block(device, dense, poison):
    packing, geometry = dense.pack([100], device), Geometry(4, 2, 8, 5, 1, 2, 16)
    q, k = draw(100, 50, 4, 2, 32, device)
    q, k = q.round(), torch.ones_like(k)  # products that are exact in any order
    lse = exact_lse(q, k, packing, geometry, 0.2).float()
    indices = select_blocks(q, k, lse, packing, geometry, scale=0.2, tile=SMALL)
    wanted = [0, 1, 2, 11, 12]  # block 0 is forced, and 11 and 12; the rest are equal
    assert (indices[96:] == torch.tensor(wanted, device=device)).all()
    for t in range(48, 100):
        current = t // 8
        assert indices[t].tolist() == [[0, 1, 2, current - 1, current]] * 2


def test_no_importance_at_all(device, dense, poison):
    """Weights that vanish in fp32 still fill the places, lower blocks first."""
    packing, geometry = dense.pack([64], device), Geometry(4, 2, 8, 5, 1, 2, 16)
    q, k = draw(64, 32, 2, 1, 32, device)
    lse = torch.full((64, 2), 1e4, device=device)
    indices = select_blocks(q, k, lse, packing, geometry, scale=0.2, tile=SMALL)
    assert indices[63].tolist() == [[0, 1, 2, 6, 7]]


@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
def test_hardly_any_token(tokens, device, poison):
    packing = Packing.of(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, tokens)
    geometry = Geometry(8, 4, 8, 3, 1, 1, 16)
    q, k = draw(tokens, tokens // 4, 2, 1, 32, device)
    lse = exact_lse(q, k, packing, geometry, 0.2).float() if tokens else torch.zeros(0, 2, device=device)
    indices = select_blocks(q, k, lse, packing, geometry, scale=0.2, tile=SMALL)
    assert indices[:, 0].tolist() == [[0, -1, -1] if t < 8 else [0, 1, -1] for t in range(tokens)]


def test_many_blocks_and_slices(device, dense, poison):
    """Queries late in a long document, given alone: more blocks than one step of the search takes."""
    geometry = Geometry(2, 2, 4, 20, 1, 2, 16)
    packing = dense.pack([3, 1300], device)
    q, k = draw(1303, 651, 3, 1, 32, device)
    at = slice(1275, 1303)
    here = replace(packing, doc=packing.doc[at], position=packing.position[at])
    seen = torch.arange(1, 651, device=device) * 2 + 1 <= packing.position[at][:, None]  # the document's slots
    s = torch.einsum("thd,cd->thc", q[at], k[1:, 0]) * 0.3
    lse = s.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    indices = select_blocks(q[at], k, lse, here, geometry, scale=0.3, tile=SMALL)
    dense.check_selection(indices, q[at], k, lse, here, geometry, 0.3, 1e-5)
    assert (indices.amax(-1) > 256).all()


def test_causal_isolated_and_repeatable(device, dense):
    packing, geometry = dense.pack([24, 36], device), Geometry(4, 2, 4, 4, 1, 2, 16)
    q, k = draw(60, 30, 2, 1, 32, device)
    lse = exact_lse(q, k, packing, geometry, 0.2).float()
    indices = select_blocks(q, k, lse, packing, geometry, scale=0.2, tile=SMALL)
    assert torch.equal(indices, select_blocks(q, k, lse, packing, geometry, scale=0.2, tile=SMALL, programs=2))
    # Slot 12 + i holds the tokens 24 + 2 i .. 24 + 2 i + 3.
    for hidden, same in ((slice(20, 30), slice(0, 43)), (slice(0, 12), slice(24, 60)), (slice(12, 30), slice(0, 24))):
        k2 = k.clone()
        k2[hidden] = 3.0
        again = select_blocks(q, k2, lse, packing, geometry, scale=0.2, tile=SMALL)
        assert torch.equal(again[same], indices[same])


def test_large_logits_in_half_precision_by_default_tiles(device, dense, poison):
    packing, geometry = dense.pack([90], device), Geometry(4, 2, 8, 4, 1, 2, 16)
    q, k = (10 * x for x in draw(90, 45, 4, 2, 32, device, torch.float16))
    lse = exact_lse(q, k, packing, geometry, 0.2)
    indices = select_blocks(q, k, lse.float(), packing, geometry, scale=0.2)
    dense.check_selection(indices, q, k, lse, packing, geometry, 0.2, 1e-2)


REAL = [  # documents, query heads, KV heads, d_qk, (l, d, l', n, initial, local)
    ([6000], 64, 4, 128, (32, 16, 64, 16, 1, 2)),
    ([2500, 1, 0, 700, 31, 1800], 64, 4, 192, (32, 16, 64, 16, 1, 2)),
    ([5001], 16, 4, 128, (32, 16, 64, 16, 1, 2)),
    ([3000], 12, 1, 80, (32, 16, 96, 16, 1, 2)),
    ([2048, 77], 7, 1, 64, (16, 8, 16, 64, 2, 3)),
    ([3000], 64, 1, 96, (64, 16, 64, 8, 1, 1)),
    ([157] * 40, 10, 2, 256, (8, 4, 16, 4, 1, 2)),
    ([4000], 5, 5, 32, (32, 32, 128, 4, 0, 1)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_on_the_gpu(case, dtype, dense, poison):
    lengths, heads, kv_heads, d_qk, sizes = case
    packing, geometry, scale = dense.pack(lengths, "cuda"), Geometry(*sizes, 512), d_qk**-0.5
    q, k = draw(sum(lengths), sum(lengths) // geometry.kernel_stride, heads, kv_heads, d_qk, "cuda", dtype)
    lse = exact_lse(q, k, packing, geometry, scale)
    indices = select_blocks(q, k, lse.float(), packing, geometry, scale=scale)
    # Products of halves are exact, their sums are in fp32.
    dense.check_selection(indices, q, k, lse, packing, geometry, scale, 1e-4)
    assert torch.equal(indices, select_blocks(q, k, lse.float(), packing, geometry, scale=scale))
    q, k = q.round(), torch.ones_like(k)
    lse = exact_lse(q, k, packing, geometry, scale)
    indices = select_blocks(q, k, lse.float(), packing, geometry, scale=scale)
    dense.check_selection(indices, q, k, lse, packing, geometry, scale, 1e-4)


@pytest.mark.gpu
def test_memory_at_64k(dense):
    """Scratch memory instead of tokens times blocks."""
    packing, geometry = dense.pack([65536], "cuda"), Geometry(32, 16, 64, 16, 1, 2, 512)
    q, k = draw(65536, 4096, 64, 4, 128, "cuda", torch.bfloat16)
    lse = torch.zeros(65536, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    select_blocks(q, k, lse, packing, geometry, scale=0.1)
    assert torch.cuda.max_memory_allocated() - held < 0.1e9
