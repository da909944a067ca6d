"""Full and window attention over caches: both implementations against attention over the packed row."""

import pytest
import torch

from sieve.kernels.full.decode import cached_attention
from sieve.kernels.full.reference import causal_attention


@pytest.mark.parametrize("impl", ["sdpa", "reference", "auto"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("width", [1, 5, 140])
def test_equals_the_packed_row(packed, impl, window, width):
    rng = torch.Generator().manual_seed(0)
    lengths = [150, 141]
    q, k, v = (torch.randn(291, h, d, generator=rng, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, 4)))
    want, _ = causal_attention(q, k, v, packed(lengths), window, scale=0.4)
    keys, values = (torch.zeros(2, 2, 150, x.shape[2], dtype=x.dtype) for x in (k, v))
    for row, start in enumerate((0, 150)):
        n = lengths[row]
        for cache, x in ((keys, k), (values, v)):
            cache[row, :, :n] = x[start : start + n].transpose(0, 1)
    query = torch.stack([torch.arange(n - width, n) for n in lengths])
    take = torch.tensor([0, 150])[:, None] + query
    order = torch.randperm(150, generator=rng)  # places may be in any order, and some hold nothing
    key = torch.arange(150).expand(2, -1)[:, order].where(torch.tensor([[150], [141]]) > order, -1)
    out = cached_attention(q[take], keys[:, :, order], values[:, :, order], query, key, scale=0.4, window=window, impl=impl)
    torch.testing.assert_close(out, want[take], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_a_query_that_sees_nothing_is_zero(impl):
    x = torch.randn(1, 2, 2, 4)
    key = torch.tensor([[-1, 3]])
    out = cached_attention(x, x.transpose(1, 2), x.transpose(1, 2), torch.tensor([[0, 3]]), key, scale=1.0, impl=impl)
    assert (out[0, 0] == 0).all() and torch.equal(out[0, 1], x[0, 1])


def test_users_mistakes():
    x, at = torch.randn(1, 2, 2, 4), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="impl='cuda' is not one of auto, triton, sdpa, reference"):
        cached_attention(x, x, x, at, at, scale=1.0, impl="cuda")
    with pytest.raises(ValueError, match="do not fit together"):
        cached_attention(x, x[:, :, :, :3], x, at, at, scale=1.0)
    with pytest.raises(ValueError, match=r"positions must be \[1, 2\]"):
        cached_attention(x, x, x, at[:, :1], at, scale=1.0)
