"""A step's choice of blocks by training's kernels: to the bit that of the whole row, whatever the batch."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa.compress_fwd import compressed_attention_fwd  # noqa: E402
from sieve.kernels.nsa.decode import nsa_decode  # noqa: E402
from sieve.kernels.nsa.decode_choice import choose  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.scores_topk import select_blocks  # noqa: E402

TOY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=12)
LONG = Geometry(32, 16, 32, topk=3, init_blocks=1, local_blocks=1, window_size=12)  # blocks longer than tiles of queries
PAPER = Geometry(32, 16, 64, 16, 1, 2, 512)


def texts(lengths, geometry, heads, groups, dim, device, dtype, op, dense):
    """Rows of those lengths with the training kernels' choices, and the caches that hold them all at their ends."""
    case, room = SimpleNamespace(chosen=[], scale=dim**-0.5), max(lengths) // geometry.kernel_stride + 17
    slots = room // 16 * 16
    case.k_cmp, case.v_cmp = (torch.zeros(len(lengths), groups, slots, dim, device=device, dtype=dtype) for _ in range(2))
    case.rows = []
    for row, length in enumerate(lengths):
        packing = dense.pack([length], device)
        drawn = op.draw(length, heads, groups, dim, dim, geometry, device, dtype, row)
        q, k_cmp, v_cmp, *rest = (x.detach() for x in drawn)
        _, lse = compressed_attention_fwd(q, k_cmp, v_cmp, packing, geometry, scale=case.scale)
        case.chosen.append(select_blocks(q, k_cmp, lse, packing, geometry, scale=case.scale))
        case.rows.append((q, *rest))
        for cache, x in ((case.k_cmp, k_cmp), (case.v_cmp, v_cmp)):
            cache[row, :, : len(x)] = x.transpose(0, 1)
    return case


def step(case, at, geometry):
    """choose's, of the queries at positions `at`, one of each row."""
    q = torch.stack([row[0][p] for row, p in zip(case.rows, at)])[:, None]
    query = torch.tensor(at, dtype=torch.int32, device=q.device)[:, None]
    return choose(q, case.k_cmp, case.v_cmp, query, max(at) + 1, geometry, scale=case.scale)


@pytest.mark.parametrize("heads, groups, geometry", [
    (5, 1, LONG), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 2, TOY), (3, 3, TOY), (16, 1, LONG)])
])  # fmt: skip
def test_mixed_lengths(heads, groups, geometry, device, op, dense):
    """Also where a tile holds no whole number of queries' heads, so that some would share a tile."""
    lengths = [8, 170, 150] if geometry is LONG else [8, 90]
    case = texts(lengths, geometry, heads, groups, 16, device, torch.float32, op, dense)
    got = step(case, [n - 1 for n in lengths], geometry)
    for row, chosen in zip(got, case.chosen):
        assert torch.equal(row[0], chosen[-1])
    at = [0, *(n - 40 for n in lengths[1:])]
    earlier = step(case, at, geometry)
    assert torch.equal(earlier[1, 0], case.chosen[1][at[1]]) and not torch.equal(earlier[1], got[1])


def test_the_kernels_read_what_was_chosen(device, op, dense, monkeypatch):
    """exact=True: indices are the choice's, and the output is of those blocks, whichever they are."""
    from sieve.kernels.nsa import decode_reference, decode_triton

    case = texts([80, 70], TOY, 4, 2, 16, device, torch.float32, op, dense)
    q = torch.stack([row[0][-1] for row in case.rows])[:, None]
    query = torch.tensor([[79], [69]], dtype=torch.int32, device=device)
    k_slc, v_slc = (torch.zeros(2, 2, 80, 16, device=device) for _ in range(2))
    for row, (_, k, v, *_) in enumerate(case.rows):
        k_slc[row, :, : len(k)], v_slc[row, :, : len(v)] = k.transpose(0, 1), v.transpose(0, 1)
    windows = [torch.randn(2, 2, 12, 16, device=device) for _ in range(2)]
    place = torch.arange(12, dtype=torch.int32, device=device)
    held = query - torch.remainder(query - place, 12)
    args = (q, case.k_cmp, case.v_cmp, k_slc, v_slc, *windows, torch.ones(2, 1, 4, 3, device=device), query, held, 80, TOY)
    out, indices = nsa_decode(*args, scale=case.scale, impl="triton", exact=True)
    assert torch.equal(indices[:, 0], torch.stack([chosen[-1] for chosen in case.chosen]))
    want, _ = nsa_decode(*args, scale=case.scale, impl="reference")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    other = torch.tensor([0, 1, 2, 5], dtype=torch.int32, device=device).expand(2, 1, 2, 4)
    monkeypatch.setattr(decode_triton, "choose", lambda *a, **k: other)
    monkeypatch.setattr(decode_reference, "rank_blocks", lambda q, *a: other.transpose(1, 2).expand(-1, -1, q.shape[3], -1))
    out, indices = nsa_decode(*args, scale=case.scale, impl="triton", exact=True)
    assert torch.equal(indices, other) and not torch.allclose(out, want, atol=1e-3)
    torch.testing.assert_close(out, nsa_decode(*args, scale=case.scale, impl="reference")[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, groups, dim, dtype", [
    (64, 4, 128, torch.bfloat16), (16, 4, 128, torch.float16), (12, 3, 64, torch.float32), (5, 1, 80, torch.bfloat16),
], ids=str)  # fmt: skip
def test_real_sizes(heads, groups, dim, dtype, op, dense):
    lengths = [8192, 8001, 5000, 1024]
    case = texts(lengths, PAPER, heads, groups, dim, "cuda", dtype, op, dense)
    for back in range(1, 1000, 3):
        got = step(case, [n - back for n in lengths], PAPER)
        assert all(torch.equal(row[0], chosen[-back]) for row, chosen in zip(got, case.chosen)), back
