"""The Triton kernel of cached attention against the reference in float64."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.full import decode_triton  # noqa: E402
from sieve.kernels.full.decode import cached_attention  # noqa: E402


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def draw(lengths, heads, groups, d_qk, d_v, room, device, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = (len(lengths), 1, heads, d_qk), (len(lengths), groups, room, d_qk), (len(lengths), groups, room, d_v)
    tensors = [torch.randn(s, generator=rng).to(device, dtype) for s in shapes]
    return *tensors, torch.tensor(lengths, dtype=torch.int32, device=device)[:, None] - 1


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("dims", [
    (1, 64, 64), (3, 192, 128),
    *(pytest.param(dims, marks=pytest.mark.slow) for dims in [(3, 128, 128), (16, 192, 128), (64, 32, 80)]),
], ids=str)
def test_mixed_lengths_in_order(window, dims, device):
    """What lies past a sequence's length is NaN."""
    group, d_qk, d_v = dims
    q, k, v, query = draw([1, 31, 32, 33, 64, 300], 2 * group, 2, d_qk, d_v, 320, device)
    want = cached_attention(
        *(x.double() for x in (q, k, v)), query, None, scale=0.1, window=window, impl="reference"
    )
    unseen = (torch.arange(320, device=device) > query)[:, None, :, None]
    k, v = (x.masked_fill(unseen, math.nan) for x in (k, v))
    for programs in (1, 30, 1000):
        out = decode_triton.cached_attention(q, k, v, query, None, scale=0.1, window=window, programs=programs)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_places_in_any_order(window, device):
    q, k, v, query = draw([300, 41], 4, 2, 64, 32, 300, device, torch.float16)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(device)
    key = torch.where(order <= query, order, -1).int()
    exact = [x.double() for x in (q, k[:, :, order], v[:, :, order])]
    want = cached_attention(*exact, query, key, scale=0.1, window=window, impl="reference")
    out = cached_attention(q, k[:, :, order], v[:, :, order], query, key, scale=0.1, window=window, impl="triton")
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


def test_a_query_that_sees_nothing_is_zero(device):
    q, k, v, query = draw([1, 5], 4, 2, 32, 32, 8, device)
    key = torch.full((2, 8), -1, dtype=torch.int32, device=device)
    key[1, 3] = 4
    out = cached_attention(q, k, v, query, key, scale=1.0, impl="triton")
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1, 0], v[1, :, 3].repeat_interleave(2, 0))


def test_users_mistakes(device):
    q, k, v, query = draw([5], 4, 2, 112, 32, 8, device)
    with pytest.raises(ValueError, match="no kernel for head dimensions 112 and 32"):
        cached_attention(q, k, v, query, None, scale=1.0, impl="triton")
