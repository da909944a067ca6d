"""Selected attention kernels against plain attention in float64: outputs, every gradient, odd shapes, promises."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa import reference  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.layout import Packing  # noqa: E402
from sieve.kernels.nsa.select_config import Tile  # noqa: E402
from sieve.kernels.nsa.select_dkv import selected_dkv  # noqa: E402
from sieve.kernels.nsa.select_dq import selected_dq  # noqa: E402
from sieve.kernels.nsa.select_fwd import selected_attention_fwd  # noqa: E402

WIDE_TILE = Tile(64, 16, 4, 1)  # few programs: the interpreter's time goes by program and step


def geometry_of(block, topk):
    return Geometry(block, block, block, topk, 0, 1, block)


def choose(packing, kv_heads, block, topk, seed=0, current=True, local=None):
    """Random ascending block numbers, on the host's side; `current` puts the query's own block among them.

    With `local`, so many neighbouring tokens choose alike, as those of trained models do.
    """
    g = torch.Generator().manual_seed(seed)
    position = packing.position.cpu()
    T, most = position.numel(), int(position.max()) // block + 1
    run = torch.arange(T) if local is None else torch.arange(T) // local
    score = torch.rand(int(run.max()) + 1, kv_heads, max(most, topk), generator=g)[run]
    j = torch.arange(score.shape[2])
    now = (position // block)[:, None, None]
    score = torch.where(j == now, 2.0 if current else 1e-3, score).masked_fill(j > now, -1.0)
    value, index = score.topk(topk, -1)
    index = index.masked_fill(value < 0, score.shape[2]).sort(-1).values
    return index.masked_fill(index == score.shape[2], -1).int().to(packing.doc.device)


def draw(tokens, heads, kv_heads, d_qk, d_v, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, d_qk), (tokens, kv_heads, d_qk), (tokens, kv_heads, d_v), (tokens, heads, d_v)
    return tuple(torch.randn(s, generator=g).to(device, dtype) for s in shapes)


def run(q, k, v, do, indices, packing, geometry, tile=None, length=None, lists=None):
    """o, lse, dq, dk, dv of the kernels."""
    scale = q.shape[2] ** -0.5
    o, lse = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=scale, tile=tile, lists=lists)
    delta = (o.float() * do.float()).sum(-1)
    rest = do, q, k, v, indices, lse, delta, packing, geometry
    dq = selected_dq(*rest, scale=scale, tile=tile, lists=lists)
    return o, lse, dq, *selected_dkv(*rest, scale=scale, tile=tile, length=length)


def exactly(q, k, v, do, indices, packing, geometry):
    """o, lse, dq, dk, dv in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    o, lse = reference.selected_attention(q, k, v, indices, packing, geometry, scale=q.shape[2] ** -0.5)
    return o.detach(), lse, *torch.autograd.grad(o, (q, k, v), do.double())


def check(got, want, dense, tolerance=2e-5):
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), got, want):
        assert torch.isfinite(a).all(), name
        assert max(dense.relative_errors(a, b)) < tolerance, (name, dense.relative_errors(a, b))


CASES = [  # documents, query heads, KV heads, d_qk, d_v, block size, topk
    ([35], 4, 1, 32, 32, 16, 2),
    ([1], 3, 1, 32, 48, 16, 4),
    ([21, 0, 1, 30], 6, 2, 48, 16, 16, 2),
    ([40], 16, 1, 16, 32, 16, 2),
    ([35], 1, 1, 192, 128, 16, 1),
    ([70], 2, 1, 16, 16, 32, 2),
    ([70, 30], 5, 1, 16, 80, 24, 2),
    ([9], 64, 1, 16, 16, 16, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_plain_attention(case, device, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, block, topk = case
    packing = dense.pack(lengths, device)
    inputs = draw(sum(lengths), heads, kv_heads, d_qk, d_v, device)
    geometry, indices = geometry_of(block, topk), choose(packing, kv_heads, block, topk)
    check(run(*inputs, indices, packing, geometry, WIDE_TILE), exactly(*inputs, indices, packing, geometry), dense)


LIST_CASES = [
    ([35], 4, 1, 32, 32, 16, 2),
    ([1], 3, 1, 32, 48, 16, 4),
    ([21, 0, 1, 30], 2, 2, 48, 16, 16, 2),
    ([50, 20], 5, 1, 16, 80, 24, 2),
    ([30], 1, 1, 192, 128, 16, 1),
]


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
def test_by_lists(case, device, dense, poison, monkeypatch):
    from sieve.kernels.nsa import select_gather

    monkeypatch.setattr(select_gather, "partial_segment", lambda token_bytes: 24)
    lengths, heads, kv_heads, d_qk, d_v, block, topk = case
    packing = dense.pack(lengths, device)
    inputs = draw(sum(lengths), heads, kv_heads, d_qk, d_v, device)
    geometry, indices = geometry_of(block, topk), choose(packing, kv_heads, block, topk)
    indices[sum(lengths) // 2, 0] = -1
    o, lse, *grads = run(*inputs, indices, packing, geometry, WIDE_TILE, lists=True)
    want = exactly(*inputs, indices, packing, geometry)
    check((o, lse.clamp(min=-1e3), *grads), (want[0], want[1].clamp(min=-1e3), *want[2:]), dense)
    assert not o[sum(lengths) // 2].view(kv_heads, -1)[0].any()


def test_default_tiles_and_half_precision(device, dense, poison):
    packing = dense.pack([30, 5], device)
    inputs = draw(35, 4, 2, 48, 32, device, torch.float16)
    geometry, indices = geometry_of(16, 2), choose(packing, 2, 16, 2)
    got, want = run(*inputs, indices, packing, geometry), exactly(*inputs, indices, packing, geometry)
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), got, want):
        assert dense.relative_errors(a, b)[0] < 2e-3, name


def test_forty_documents(device, dense, poison):
    lengths = (torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(5))).tolist()
    lengths[3:6] = [1, 0, 34]
    packing = dense.pack(lengths, device)
    inputs = draw(sum(lengths), 2, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    check(run(*inputs, indices, packing, geometry, WIDE_TILE, 40), exactly(*inputs, indices, packing, geometry), dense)


@pytest.mark.parametrize("length", [5, 100])
def test_one_block_that_every_query_wants(length, device, dense, poison):
    packing = dense.pack([50], device)
    inputs = draw(50, 4, 1, 16, 32, device)
    geometry, indices = geometry_of(16, 2), torch.zeros(50, 1, 2, dtype=torch.int32, device=device)
    indices[:, :, 1] = -1  # not even a query's own block: the others get no gradient
    got = run(*inputs, indices, packing, geometry, WIDE_TILE, length)
    check(got, exactly(*inputs, indices, packing, geometry), dense)
    assert not got[3][16:].any() and not got[4][16:].any()


def test_queries_without_blocks_are_exactly_zero(device, dense, poison):
    packing = dense.pack([20, 10], device)
    inputs = draw(30, 2, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    none = torch.tensor([0, 7, 19, 22], device=device)
    indices[none] = -1
    o, lse, dq, dk, dv = run(*inputs, indices, packing, geometry, WIDE_TILE)
    assert not o[none].any() and not dq[none].any() and (lse[none] == float("-inf")).all()
    want = exactly(*inputs, indices, packing, geometry)
    check((o, want[1].clamp(min=-1e3), dq, dk, dv), (want[0], want[1].clamp(min=-1e3), *want[2:]), dense)


def test_large_logits_and_equal_keys(device, dense, poison):
    packing = dense.pack([40], device)
    q, k, v, do = draw(40, 4, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    q = q * (100 * 16**0.5 / (q * k).sum(-1).abs().max())
    rest = v, do, indices, packing, geometry
    check(run(q, k, *rest, WIDE_TILE), exactly(q, k, *rest), dense, 2e-4)
    k = k[:1].expand_as(k)
    got, want = run(q, k, *rest, WIDE_TILE), exactly(q, k, *rest)
    assert got[2].abs().max() < 1e-6  # equal keys leave q no gradient
    check((*got[:2], want[2], *got[3:]), want, dense, 2e-4)


def test_runs_repeat_bit_for_bit_and_tiles_do_not_move_a_row(device, dense):
    packing = dense.pack([20, 4], device)
    inputs = draw(24, 4, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    first = run(*inputs, indices, packing, geometry, WIDE_TILE, 16, 8)
    for a, b in zip(first, run(*inputs, indices, packing, geometry, WIDE_TILE, 16, 8)):
        assert torch.equal(a, b)
    other, _ = selected_attention_fwd(*inputs[:3], indices, packing, geometry, scale=0.25, tile=Tile(16, 16, 4, 1))
    assert torch.allclose(first[0], other, atol=1e-6)


def test_hidden_keys_do_not_move_a_bit(device, dense, poison):
    packing = dense.pack([12, 30], device)
    q, k, v, _ = draw(42, 4, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    want = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=0.25, tile=WIDE_TILE)
    first, later = slice(0, 12), slice(30, 42)  # another document; the future
    for hidden, seen in ((first, slice(12, 42)), (later, slice(0, 30))):
        other_k, other_v = k.clone(), v.clone()
        other_k[hidden], other_v[hidden] = 1e4, -1e4
        got = selected_attention_fwd(q, other_k, other_v, indices, packing, geometry, scale=0.25, tile=WIDE_TILE)
        for a, b in zip(got, want):
            assert torch.equal(a[seen], b[seen])


def test_wide_offsets_and_ungathered_rows(device, dense, poison, monkeypatch):
    from sieve.kernels.nsa import select_dkv

    packing = dense.pack([30], device)
    inputs = draw(30, 6, 2, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 2, 16, 2)
    want = run(*inputs, indices, packing, geometry, WIDE_TILE)[3:]
    monkeypatch.setattr(select_dkv, "GATHER_BYTES", 0)
    monkeypatch.setattr(select_dkv, "_reach", lambda x, group: 2**31)
    for a, b in zip(run(*inputs, indices, packing, geometry, WIDE_TILE)[3:], want):
        assert torch.equal(a, b)


def test_slices_of_the_queries_give_the_same_bits(device, dense, poison):
    packing = dense.pack([30, 13], device)
    q, k, v, _ = draw(43, 3, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    whole = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=0.25, tile=WIDE_TILE)
    for at in (slice(0, 21), slice(21, 43)):  # as tiles of 21 tokens fall: the interpreter's dots do not repeat else
        here = Packing(packing.cu_seqlens, packing.doc[at], packing.position[at], packing.max_seqlen)
        part = selected_attention_fwd(
            q[at], k, v, indices[at], here, geometry, scale=0.25, first_token=at.start, tile=WIDE_TILE
        )
        for a, b in zip(part, whole):
            assert torch.equal(a, b[at])


def test_gates_fold_into_lse_and_dq_adds_up(device, dense, poison):
    packing = dense.pack([34], device)
    q, k, v, do = draw(34, 2, 1, 16, 16, device)
    geometry, indices = geometry_of(16, 2), choose(packing, 1, 16, 2)
    gate = torch.rand(34, 2, device=device)
    gate[3] = 0.0
    o, lse = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=0.25, tile=WIDE_TILE)
    rest = do, q, k, v, indices, lse - gate.log(), (o * do).sum(-1), packing, geometry
    dq = selected_dq(*rest, scale=0.25, dq=torch.ones_like(q), tile=WIDE_TILE) - 1.0
    _, _, *want = exactly(q, k, v, do * gate[..., None], indices, packing, geometry)
    for a, b in zip((dq, *selected_dkv(*rest, scale=0.25, tile=WIDE_TILE)), want):
        assert max(dense.relative_errors(a, b)) < 2e-5


def test_strided_inputs(device, dense, poison):
    packing = dense.pack([25], device)
    q, k, v, do = draw(25, 4, 2, 16, 16, device)
    geometry, indices = geometry_of(16, 1), choose(packing, 2, 16, 1)
    want = run(q, k, v, do, indices, packing, geometry, WIDE_TILE)
    apart = [torch.stack([x, x], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1] for x in (q, k, v, do)]
    for a, b in zip(run(*apart, indices, packing, geometry, WIDE_TILE), want):
        assert torch.equal(a, b)


def test_no_tokens_and_wrong_arguments(device):
    packing = Packing.of(torch.zeros(2, dtype=torch.int32, device=device), 0, 0)
    q, k, v, do = draw(0, 4, 2, 32, 16, device)
    indices = torch.zeros(0, 2, 3, dtype=torch.int32, device=device)
    assert [x.shape[0] for x in run(q, k, v, do, indices, packing, geometry_of(16, 3))] == [0] * 5
    with pytest.raises(ValueError, match="scale=0"):
        selected_attention_fwd(q, k, v, indices, packing, geometry_of(16, 3), scale=0.0)
    with pytest.raises(ValueError, match="112"):
        selected_attention_fwd(*draw(4, 2, 1, 112, 16, device)[:3], indices, packing, geometry_of(16, 3), scale=1.0)


GPU_CASES = [  # documents, query heads, KV heads, d_qk, d_v, block size, topk
    ([2048], 64, 4, 128, 128, 64, 16),
    ([1500, 1, 0, 547], 64, 4, 192, 128, 64, 16),
    ([1111], 16, 4, 128, 128, 64, 16),
    ([700, 300], 12, 4, 64, 64, 64, 8),
    ([900], 35, 5, 128, 256, 64, 8),
    ([800], 10, 2, 96, 80, 32, 16),
    ([640, 77], 24, 2, 128, 32, 128, 4),
    ([600], 6, 6, 64, 64, 16, 16),
    ([500], 64, 1, 256, 256, 64, 4),
    ([700], 18, 3, 48, 96, 48, 8),
]


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WAYS = [(None, case, dtype) for case in GPU_CASES for dtype in DTYPES]
WAYS += [  # lists hold a whole block's keys and values in shared memory
    (True, case, dtype) for case in GPU_CASES for dtype in DTYPES[:2] if (case[3] + case[4]) * case[5] <= 32768
]


@pytest.mark.gpu
@pytest.mark.parametrize("lists, case, dtype", WAYS, ids=str)
def test_gpu_is_as_exact_as_plain_attention_in_its_dtype(lists, case, dtype, dense, poison):
    lengths, heads, kv_heads, d_qk, d_v, block, topk = case
    packing = dense.pack(lengths, "cuda")
    inputs = draw(sum(lengths), heads, kv_heads, d_qk, d_v, "cuda", dtype)
    geometry, indices = geometry_of(block, topk), choose(packing, kv_heads, block, topk, local=3)
    got = run(*inputs, indices, packing, geometry, lists=lists)
    want = exactly(*inputs, indices, packing, geometry)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    _, chosen, _ = dense.nsa_masks(packing, geometry, indices)
    o = dense.attend(q, k, v, chosen, d_qk**-0.5)
    plain = (o.detach(), want[1], *torch.autograd.grad(o, (q, k, v), inputs[3]))
    for name, a, b, c in zip(("o", "lse", "dq", "dk", "dv"), got, plain, want):
        assert torch.isfinite(a).all(), name
        floor = 1e-5 if dtype == torch.float32 else 1e-3
        for mine, theirs in zip(dense.relative_errors(a, c), dense.relative_errors(b, c)):
            assert mine <= max(2 * theirs, floor), (name, mine, theirs)
    for a, b in zip(run(*inputs, indices, packing, geometry, lists=lists), got):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [3, 16])
def test_gpu_slices_and_hidden_keys_do_not_move_a_bit(group, dense, poison):
    packing = dense.pack([1000, 300], "cuda")
    q, k, v, _ = draw(1300, 4 * group, 4, 128, 128, "cuda", torch.bfloat16)
    geometry, indices = geometry_of(64, 8), choose(packing, 4, 64, 8)
    whole = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=0.1)
    k[700:1000], v[1000:] = 1e4, -1e4
    for at in (slice(0, 333), slice(333, 700)):
        here = Packing(packing.cu_seqlens, packing.doc[at], packing.position[at], packing.max_seqlen)
        part = selected_attention_fwd(q[at], k, v, indices[at], here, geometry, scale=0.1, first_token=at.start)
        for a, b in zip(part, whole):
            assert torch.equal(a, b[at])


@pytest.mark.gpu
def test_gpu_memory_at_64k(dense):
    """The branch's share of what the operator may hold beyond inputs and outputs: 1.5 GB forward, 4 GB backward."""
    tokens = 65536
    packing = dense.pack([tokens], "cuda")
    q, k, v, do = (torch.randn(tokens, h, 128, device="cuda", dtype=torch.bfloat16) for h in (64, 4, 4, 64))
    now = torch.arange(tokens, device="cuda", dtype=torch.int32)[:, None, None] // 64
    indices = (now - 15).clamp(min=0) + torch.arange(16, device="cuda", dtype=torch.int32)
    indices = torch.where(indices > now, -1, indices).expand(-1, 4, -1)
    geometry = geometry_of(64, 16)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    o, lse = selected_attention_fwd(q, k, v, indices, packing, geometry, scale=0.1)
    outputs = o.numel() * 2 + lse.numel() * 4
    assert torch.cuda.max_memory_allocated() - held - outputs < 0.5 * 2**30
    delta = (o * do).sum(-1, dtype=torch.float32)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    rest = do, q, k, v, indices, lse, delta, packing, geometry
    grads = selected_dq(*rest, scale=0.1), *selected_dkv(*rest, scale=0.1)
    assert torch.cuda.max_memory_allocated() - held - sum(g.numel() * 2 for g in grads) < 2 * 2**30
