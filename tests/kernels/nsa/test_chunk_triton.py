"""Runs of new tokens over a cache by training's kernels: the whole row's choices to the bit, and its outputs."""

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa import autograd  # noqa: E402
from sieve.kernels.nsa.chunk_triton import attend_run  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.triton_ops import nsa_attention  # noqa: E402

TOY = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=12)
LISTS, UNION = (4, 2, 32, 16), (16, 1, 16, 16)  # selection by lists of queries, and by the union of a tile's blocks


def run(inputs, past, end, geometry):
    """Of the tokens [past, end), from caches that lie as a decoder's, with room to spare that holds NaN."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x.detach() for x in inputs)
    stored = []
    for x, held in zip((k_cmp, v_cmp, k_slc, v_slc), (len(k_cmp), len(k_cmp), end, end)):
        room = x.new_full((x.shape[1], len(q) + 9, x.shape[2]), float("nan"))
        stored.append(room)
        room[:, :held] = x[:held].transpose(0, 1)
    first = max(0, past + 1 - geometry.window_size)
    windows = (x[first:end] for x in (k_win, v_win))
    return attend_run(q[past:end], *stored, *windows, gates[past:end], past, geometry, scale=q.shape[2] ** -0.5)


@pytest.mark.parametrize("shape", [LISTS, pytest.param(UNION, marks=pytest.mark.slow)], ids=str)
def test_runs_equal_the_whole_row(shape, device, dense, op):
    """Beginning and ending before, at and past the ends of compressed blocks, selection blocks, and the window."""
    inputs, packing = op.draw(110, *shape, TOY, device), dense.pack([110], device)
    want, chosen = nsa_attention(*inputs, packing, TOY, scale=shape[2] ** -0.5)
    for past, end in [(1, 3), (5, 8), (11, 13), (64, 110)]:
        got, indices = run(inputs, past, end, TOY)
        assert torch.equal(indices, chosen[past:end]), (past, end)
        torch.testing.assert_close(got, want[past:end].detach(), rtol=1e-5, atol=1e-6)
    assert (chosen[100] != chosen[101]).any()


def test_a_run_in_slices_is_the_same(device, dense, op, monkeypatch):
    """Where a run's outputs are too large to be held at once; slices of whole tiles leave every bit alone."""
    inputs, calls = op.draw(60, *LISTS, TOY, device), []
    want = run(inputs, 20, 60, TOY)
    monkeypatch.setattr(autograd, "SLICE_BYTES", 1)
    monkeypatch.setattr(autograd, "SLICE_TOKENS", 32)
    original = autograd.token_slices
    from sieve.kernels.nsa import chunk_triton

    monkeypatch.setattr(chunk_triton, "token_slices", lambda *a: calls.append(original(*a)) or calls[-1])
    got = run(inputs, 20, 60, TOY)
    assert calls == [[(0, 32), (32, 40)]]
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_windows_of_another_length(device, op):
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = op.draw(40, *LISTS, TOY, device)
    stored = [x.transpose(0, 1) for x in (k_cmp, v_cmp, k_slc, v_slc)]
    with pytest.raises(ValueError, match=r"k_win has 20 tokens before the 20 new ones, not min\(20, 12 - 1\)"):
        attend_run(q[20:], *stored, k_win, v_win, gates[20:], 20, TOY, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, dtype", [
    ((64, 4, 128, 128), torch.bfloat16), ((16, 4, 128, 128), torch.float16), ((12, 3, 64, 64), torch.float32),
], ids=str)  # fmt: skip
def test_choices_at_real_sizes_are_equal_to_the_bit(shape, dtype, op, dense):
    geometry = Geometry(32, 16, 64, 16, 1, 2, 512)
    inputs, packing = op.draw(8200, *shape, geometry, "cuda", dtype), dense.pack([8200], "cuda")
    want, chosen = nsa_attention(*inputs, packing, geometry, scale=shape[2] ** -0.5)
    for past, end in [(1, 700), (511, 513), (4000, 8200), (8190, 8191)]:
        got, indices = run(inputs, past, end, geometry)
        assert torch.equal(indices, chosen[past:end]), (past, end)
        assert dense.relative_errors(got, want[past:end])[0] < (1e-5 if dtype == torch.float32 else 5e-3)
