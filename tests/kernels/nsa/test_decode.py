"""Decoding over a cache against training's operator: the same blocks to the bit, outputs within rounding."""

import logging

import pytest
import torch

from sieve.kernels.common import log
from sieve.kernels.nsa import decode_reference, reference
from sieve.kernels.nsa.decode import nsa_decode, resolve_impl
from sieve.kernels.nsa.decode_reference import CHUNK
from sieve.kernels.nsa.geometry import Geometry

TOY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=24)
# The paper's blocks with fewer of them, so that few hundred tokens leave something to choose.
PAPER = Geometry(32, 16, 64, topk=4, init_blocks=1, local_blocks=2, window_size=100)
COARSE = Geometry(16, 16, 16, topk=3, init_blocks=1, local_blocks=1, window_size=7)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(lengths, geometry, heads=4, groups=2, dim_qk=16, dim_v=8, seed=0, dtype=torch.float32, integers=False):
    """The operator's tensors, packed; `integers` makes all scores exact, so that many importances are equal."""
    rng = torch.Generator().manual_seed(seed)
    T, C = sum(lengths), sum(lengths) // geometry.kernel_stride

    def draw(n, h, d):
        if integers:
            return torch.randint(-1, 2, (n, h, d), generator=rng).to(dtype)
        return torch.randn(n, h, d, generator=rng, dtype=torch.float64).to(dtype)

    dims = dim_qk, dim_v
    kv = [draw(n, groups, d) for n in (C, T, T) for d in dims]
    return [draw(T, heads, dim_qk), *kv, torch.rand(T, heads, 3, generator=rng).to(dtype)]


def caches(packing, k_cmp, v_cmp, k_slc, v_slc, geometry):
    """Padded [B, Hkv, places, D] of whole documents, as a cache has them."""
    ends = packing.cu_seqlens.tolist()
    longest = max(b - a for a, b in zip(ends, ends[1:]))

    def padded(x, starts, sizes, places):
        out = torch.zeros(len(starts), x.shape[1], places, x.shape[2], dtype=x.dtype)
        for i, (a, n) in enumerate(zip(starts, sizes)):
            out[i, :, :n] = x[a : a + n].transpose(0, 1)
        return out

    sizes = [b - a for a, b in zip(ends, ends[1:])]
    d = geometry.kernel_stride
    blocks = [max(0, (n - geometry.kernel_size) // d + 1) for n in sizes]
    places = -(-(longest // d + 1) // 16) * 16
    cmp = [padded(x, [a // d for a in ends[:-1]], blocks, places) for x in (k_cmp, v_cmp)]
    return *cmp, *(padded(x, ends[:-1], sizes, longest) for x in (k_slc, v_slc))


def decode(tensors, packing, geometry, spans, scale, **kwargs):
    """Queries [a, b) of document i for (a, b) = spans[i], all of one width."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = tensors
    starts = packing.cu_seqlens[:-1].tolist()
    query = torch.tensor([list(range(a, b)) for a, b in spans], dtype=torch.int32)
    take = torch.tensor(starts)[:, None] + query
    stored = caches(packing, k_cmp, v_cmp, k_slc, v_slc, geometry)
    longest = int(query.max()) + 1
    w = geometry.window_size
    back = torch.arange(1 - w, query.shape[1])
    window_key = (query[:, :1] + back).clamp(min=-1).int()
    place = (torch.tensor(starts)[:, None] + window_key).clamp(min=0)
    near = [x[place].transpose(1, 2) for x in (k_win, v_win)]
    return take, nsa_decode(
        q[take], *stored, *near, gates[take], query, window_key, longest, geometry, scale=scale, **kwargs
    )


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("geometry", [TOY, PAPER, COARSE], ids=["toy", "paper", "coarse"])
def test_one_token_at_a_time(packed, geometry, integers):
    """Every position of two documents of different lengths, together in one batch."""
    lengths = [200, 163] if geometry is not PAPER else [420, 390]
    packing = packed(lengths)
    tensors = inputs(lengths, geometry, integers=integers)
    scale = 0.5 if integers else 0.25
    want, blocks = reference.nsa_attention(*tensors, packing, geometry, scale=scale)
    differing = 0
    for t in range(lengths[0]):
        at = min(t, lengths[1] - 1)
        take, (out, indices) = decode(tensors, packing, geometry, [(t, t + 1), (at, at + 1)], scale)
        assert torch.equal(indices, blocks[take])
        torch.testing.assert_close(out, want[take], rtol=1e-5, atol=1e-5)
        recent = torch.arange(geometry.topk) + (t // geometry.block_size - geometry.topk + 1)
        differing += not torch.equal(indices[0, 0, 0], recent.int())
    assert differing > lengths[0] // 4  # it is not just the last blocks that are chosen


@pytest.mark.parametrize("heads, groups, dim_qk, dim_v", [(16, 1, 32, 16), (3, 3, 12, 20), (8, 4, 64, 64)])
@pytest.mark.parametrize("width", [2, 13, 150])
def test_chunks(packed, width, heads, groups, dim_qk, dim_v):
    lengths = [210, 260]
    packing = packed(lengths)
    tensors = inputs(lengths, TOY, heads, groups, dim_qk, dim_v)
    want, blocks = reference.nsa_attention(*tensors, packing, TOY, scale=0.3)
    assert width < CHUNK or width == 150  # more than one inner chunk in the last case
    for start in range(0, 210 - width + 1, max(width, 50)):
        spans = [(start, start + width), (start + 40, start + width + 40)]
        take, (out, indices) = decode(tensors, packing, TOY, spans, 0.3)
        assert torch.equal(indices, blocks[take])
        torch.testing.assert_close(out, want[take], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, dim_qk", [(4, 16), (16, 64), (2, 128)])
def test_importances_are_training_s_to_the_bit(packed, monkeypatch, heads, dim_qk):
    """Not the choice alone but what is compared: near-ties fall as in training, whatever the draw."""
    seen, choose = [], reference.choose_blocks

    def keep(importance, query, geometry):
        seen.append(importance.clone())
        return choose(importance, query, geometry)

    monkeypatch.setattr(reference, "choose_blocks", keep)
    packing, tensors = packed([300]), inputs([300], TOY, heads=heads, dim_qk=dim_qk)
    reference.nsa_attention(*tensors, packing, TOY, scale=0.1, chunk=300)
    (whole,) = seen  # [1, Hkv, 300, 19]
    for t in range(100, 300, 7):
        seen.clear()
        decode(tensors, packing, TOY, [(t, t + 1)], 0.1)
        (own,) = seen
        assert torch.equal(own[0, :, 0], whole[0, :, t, : t // 16 + 1]), t


def test_more_queries_at_a_time_choose_the_same(packed, monkeypatch):
    """As on a GPU, where chunks are as large as memory allows."""
    lengths = [300]
    packing, tensors = packed(lengths), inputs(lengths, TOY)
    found = []
    for chunk in (CHUNK, 1024):
        monkeypatch.setattr(decode_reference, "chunk_for", lambda q, keys, chunk=chunk: chunk)
        found.append(decode(tensors, packing, TOY, [(10, 300)], 0.3)[1])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)


def test_all_ties_go_to_the_lower_block(packed):
    packing, tensors = packed([200]), inputs([200], TOY)
    tensors[0].zero_()
    _, (_, indices) = decode(tensors, packing, TOY, [(199, 200)], 0.3)
    # Block 1's five compressed blocks lie wholly inside; all equal importances: 1 is the lowest that is not forced.
    assert indices[0, 0, 0].tolist() == [0, 1, 11, 12]


def test_half_precision_is_computed_in_fp32(packed):
    packing = packed([100])
    tensors = inputs([100], TOY, dtype=torch.bfloat16)
    want, blocks = reference.nsa_attention(*tensors, packing, TOY, scale=0.3)
    take, (out, indices) = decode(tensors, packing, TOY, [(90, 91)], 0.3)
    assert out.dtype == torch.bfloat16 and torch.equal(indices, blocks[take])
    torch.testing.assert_close(out, want[take], rtol=2e-2, atol=1e-2)


@pytest.mark.slow
def test_no_index_differs_in_many_draws(packed):
    """100 draws of 600 tokens, 2 groups: 120,000 choices."""
    lengths, choices = [600], 0
    for seed in range(100):
        packing, tensors = packed(lengths), inputs(lengths, TOY, dim_qk=32, seed=seed)
        _, blocks = reference.nsa_attention(*tensors, packing, TOY, scale=32**-0.5)
        for t in range(600):
            take, (_, indices) = decode(tensors, packing, TOY, [(t, t + 1)], 32**-0.5)
            assert torch.equal(indices, blocks[take]), (seed, t)
            choices += 2
    assert choices == 120_000


def test_users_mistakes(packed):
    packing, tensors = packed([40]), inputs([40], TOY)
    with pytest.raises(ValueError, match="impl='cuda' is not one of auto, triton, reference"):
        decode(tensors, packing, TOY, [(30, 31)], 0.3, impl="cuda")
    tensors[7] = tensors[7][:, :2]
    with pytest.raises(ValueError, match=r"gates must be \[1, 1, 4, 3\]"):
        decode(tensors, packing, TOY, [(30, 31)], 0.3)


def test_what_auto_chooses(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    log._log.cache_clear()
    with caplog.at_level(logging.INFO):
        assert resolve_impl("auto", torch.device("cpu"), torch.float32, 1, 64, 64) == "reference"
    assert "the tensors are on cpu" in caplog.text
    with pytest.raises(ValueError, match="impl='triton' cannot be had: the tensors are on cpu"):
        resolve_impl("triton", torch.device("cpu"), torch.float32, 1, 64, 64)
