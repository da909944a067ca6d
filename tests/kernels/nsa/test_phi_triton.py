"""phi of one new token a sequence against PyTorch's path in float64: lengths that complete a block and that do not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.phi import AfterPhi, PhiWeights, compress  # noqa: E402
from sieve.kernels.nsa.phi_triton import compress_token  # noqa: E402
from sieve.model.chunk import Chunk  # noqa: E402
from sieve.model.config import RopeConfig  # noqa: E402
from sieve.model.norm import RMSNorm  # noqa: E402
from sieve.model.rope import rotate, rotation  # noqa: E402

EPS = 1e-5


def geometry(l, d):
    return Geometry(l, d, 2 * l, 4, 1, 2, 8)


def draw(lengths, l, d, dk, dv, *, kind="mlp", hidden=None, heads=2, norm=True, rotated=True, dtype=torch.float32,
         device="cpu", places=16):  # fmt: skip
    """Sequences of those lengths before the new token; what phi would read is NaN where no block is completed."""
    rng, B = torch.Generator().manual_seed(0), len(lengths)

    def make(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=rng)).to(device, dtype)

    def phi(dim):
        out = hidden or 2 * dim
        w_in = make(out if kind == "mlp" else dim, l * dim, std=(l * dim) ** -0.5)
        w_out = make(dim, out, std=out**-0.5) if kind == "mlp" else None
        return PhiWeights(kind, position=make(l, dim, std=0.5), w_in=w_in, w_out=w_out)

    case = SimpleNamespace(geometry=geometry(l, d), dtype=dtype)
    case.past = torch.tensor(lengths, dtype=torch.int32, device=device)
    case.chunk = Chunk.of(case.past, case.past.tolist(), [1] * B, case.geometry, max(lengths) + 1, fresh=False)
    case.complete = [n + 1 >= l and (n + 1 - l) % d == 0 for n in lengths]
    case.number = [(n + 1 - l) // d for n in lengths]
    lost = ~torch.tensor(case.complete, device=device).repeat_interleave(l)[:, None, None]
    case.k, case.v = (make(B * l, heads, dim).masked_fill(lost, torch.nan) for dim in (dk, dv))
    case.phi = phi(dk), phi(dv)
    case.norm = RMSNorm(dk, EPS).to(device, dtype)
    with torch.no_grad():
        case.norm.weight.copy_(make(dk))
    table = rotation(case.chunk.slots.position, RopeConfig(), dk) if rotated else None
    case.after = AfterPhi((case.norm.weight.detach(), EPS) if norm else None, table)
    case.caches = [make(B, heads, places, dim) for dim in (dk, dv)]
    return case


def ours(case):
    """The caches afterwards."""
    caches = [x.clone() for x in case.caches]
    compress_token(case.past, case.k, case.v, *caches, *case.phi, case.after, case.geometry)
    return caches


@torch.no_grad()
def plain(case, dtype):
    """PyTorch's path in dtype: the blocks completed, keys and values [n, Hkv, D]."""
    found = []
    for x, weights, after in zip((case.k, case.v), case.phi, (case.after, AfterPhi(None, None))):
        given = {name: w.to(dtype) for name in ("position", "w_in", "w_out") if (w := getattr(weights, name)) is not None}
        y = compress(x.to(dtype), case.chunk.slots, case.geometry, replace(weights, **given))
        if after.norm is not None:
            y = case.norm.to(dtype)(y)
        if after.rotation is not None:
            y = rotate(y, after.rotation)
        y = y.unflatten(0, (len(case.complete), -1))[:, 0]  # a sequence's first slot may be complete, no other
        found.append(y[torch.tensor(case.complete, device=y.device)])
    case.norm.to(case.dtype)
    return found


def written(case, caches):
    """The same of the caches; all else must be as it was, to the bit."""
    found = []
    for now, before in zip(caches, case.caches):
        rows = [(b, case.number[b]) for b, complete in enumerate(case.complete) if complete]
        found.append(torch.stack([now[b, :, i] for b, i in rows]) if rows else now[:0, :, 0])
        rest = now.clone()
        for b, i in rows:
            rest[b, :, i] = before[b, :, i]
        assert torch.equal(rest, before)
    return found


def check(case, rtol, atol):
    for got, want in zip(written(case, ours(case)), plain(case, torch.float64)):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


CASES = {
    "toy": dict(l=8, d=4, dk=32, dv=32),
    "overlapping four times": dict(l=8, d=2, dk=16, dv=16),
    "not overlapping, a third": dict(l=12, d=12, dk=24, dv=6, hidden=7),
    "80 and 96": dict(l=8, d=4, dk=80, dv=96, hidden=33),
    "192 and 40": dict(l=4, d=4, dk=192, dv=40, heads=1),
    "linear": dict(l=8, d=4, dk=24, dv=40, kind="linear"),
    "neither norm nor rotation": dict(l=8, d=4, dk=16, dv=16, norm=False, rotated=False),
    "odd values": dict(l=4, d=1, dk=6, dv=5, heads=3),
}


@pytest.mark.parametrize("name", CASES)
def test_mixed_lengths(name, device, poison):
    """Before, at and after the ends of blocks; mostly more pairs than one program takes, once more columns."""
    sizes = CASES[name]
    l, d = sizes["l"], sizes["d"]
    lengths = [0, l - 2, l - 1, l, l + d - 2, l + d - 1, l + 3 * d - 1, l + 3 * d, l + 7 * d - 1]
    check(draw(lengths, device=device, **sizes), 1e-4, 1e-5)


def test_fp16(device):
    check(draw([7, 8, 11, 20, 23], 8, 4, 32, 48, dtype=torch.float16, device=device), 4e-3, 4e-3)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_rounded_where_pytorch_rounds(kind, device):
    """Most elements are then equal to the bit: what differs is the order of sums, and how the device's functions round."""
    sizes = dict(l=8, d=2, dk=64, dv=48, kind=kind, dtype=torch.float16)
    case = draw([7 + 2 * i for i in range(20)], device=device, places=24, **sizes)
    for got, want in zip(written(case, ours(case)), plain(case, torch.float16)):
        assert (got == want).float().mean() > 0.8
        assert ((got - want).abs() <= 4e-3 * want.abs() + 4e-3).all()


def test_no_sequence_completes_a_block(device):
    case = draw([0, 8, 9, 10, 4], 8, 4, 16, 16, device=device)
    assert not any(case.complete)
    assert all(torch.equal(a, b) for a, b in zip(ours(case), case.caches))


@pytest.mark.parametrize("change, message", [
    ({"kind": "mean"}, "take two of mlp or two of linear"), ({"position": None}, "with a position and without biases"),
    ({"b_in": torch.zeros(1)}, "with a position and without biases"),
])  # fmt: skip
def test_phi_that_the_kernels_do_not_take(change, message):
    case = draw([7], 8, 4, 16, 16)
    case.phi = replace(case.phi[0], **change), case.phi[1]
    with pytest.raises(ValueError, match=message):
        ours(case)


REAL = {
    "small": dict(l=32, d=16, dk=64, dv=64, heads=3), "128": dict(l=32, d=16, dk=128, dv=128, heads=4),
    "192 and 128": dict(l=32, d=16, dk=192, dv=128, heads=4), "80 and 96": dict(l=32, d=16, dk=80, dv=96, heads=8),
    "256": dict(l=64, d=16, dk=256, dv=256, heads=1), "fine": dict(l=8, d=4, dk=32, dv=64, heads=2, hidden=100),
    "linear": dict(l=32, d=16, dk=128, dv=96, heads=4, kind="linear"), "one head": dict(l=16, d=16, dk=96, dv=80, heads=1),
    "no norm": dict(l=32, d=16, dk=128, dv=128, heads=4, norm=False),
    "no rotation": dict(l=32, d=16, dk=128, dv=128, heads=4, rotated=False),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", REAL)
def test_as_exact_as_pytorch(name, dtype):
    """Batches of 1 to 64: errors against float64 at most a quarter above those of PyTorch's path, which rounds more often."""
    sizes = REAL[name]
    l, d = sizes["l"], sizes["d"]
    for lengths in ([l + 9 * d - 1], [l - 1, l, l + d - 1, 5], [l - 1 + i % (2 * d) for i in range(64)]):
        case = draw(lengths, dtype=dtype, device="cuda", **sizes)
        got, theirs, want = written(case, ours(case)), plain(case, dtype), plain(case, torch.float64)
        for a, b, c in zip(got, theirs, want):
            mine, other = ((x.double() - c).square().mean().sqrt().item() for x in (a, b))
            scale = c.square().mean().sqrt().item()
            assert mine <= 1.25 * other + 1e-5 * scale, (lengths, mine, other)
            assert (a.double() - c).abs().max() <= 16 * torch.finfo(dtype).eps * c.abs().max() + 1e-5 * scale


@pytest.mark.gpu
def test_replayed_from_a_graph_as_sequences_grow():
    """To the bit what launching anew gives, with programs that begin early or not; nothing waits for the device."""
    case = draw([30, 47, 500, 0], 32, 16, 128, 128, heads=4, dtype=torch.bfloat16, device="cuda", places=64)
    case.k, case.v = (x.nan_to_num() for x in (case.k, case.v))
    args = (*case.phi, case.after, case.geometry)
    caches = [x.clone() for x in case.caches]
    compress_token(case.past, case.k, case.v, *caches, *args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compress_token(case.past, case.k, case.v, *caches, *args)
    other = [x.clone() for x in caches]
    for i in range(50):
        for x in (case.k, case.v):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(i)))
        case.past += 1
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compress_token(case.past, case.k, case.v, *other, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(caches, other)), i
    assert not torch.equal(caches[0], case.caches[0])
