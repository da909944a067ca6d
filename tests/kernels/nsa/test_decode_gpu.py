"""The decode kernels on a GPU: bf16 at real sizes, and CUDA graphs replayed while the sequences grow."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.full.decode import cached_attention  # noqa: E402
from sieve.kernels.full.decode_triton import cached_attention as full_kernels  # noqa: E402
from sieve.kernels.nsa.decode import nsa_decode  # noqa: E402
from sieve.kernels.nsa.decode_tiles import DecodeTiles  # noqa: E402
from sieve.kernels.nsa.decode_triton import nsa_decode as kernels  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.scripts.bench.cases import Shape  # noqa: E402
from sieve.scripts.bench.decode_cases import draw  # noqa: E402
from sieve.scripts.bench.decode_check import check  # noqa: E402

pytestmark = pytest.mark.gpu
PAPER = Geometry(32, 16, 64, 16, 1, 2, 512)
SHAPES = ["64/4/128/128", "64/4/192/128", "12/3/64/64", "64/1/128/128", "8/8/80/96", "14/2/96/32", "4/4/256/256"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_lengths(shape, dtype):
    check(Shape.parse(shape), PAPER, dtype=dtype)


@pytest.mark.parametrize("tokens", [40_000, 140_000])  # the second leaves more blocks than are compared at once
def test_long(tokens):
    check(Shape.parse("16/1/128/128"), PAPER, tokens=tokens)


def test_many_blocks_chosen():
    check(Shape.parse("16/1/128/128"), Geometry(32, 16, 64, 64, 1, 2, 512), tokens=30_000)


def test_twice_the_same():
    case = draw(Shape.parse("64/4/128/128"), [9000, 100, 20_000], PAPER)
    args = (case.q, *case.kv, case.gates, case.query, case.window_key, case.longest, PAPER)
    (a, i), (b, j) = (kernels(*args, scale=case.scale) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(i, j)


@pytest.mark.parametrize("graph", [False, True], ids=["launched", "graph"])
def test_overlapped_launches_change_nothing(graph):
    """Layer after layer, each asking with what the one before gave, over caches that differ: all wait for one another.

    Scratch memory is that of the layers before, so that one which begins too early would read theirs.
    """
    cases = [draw(Shape.parse("64/4/128/128"), [9000, 3000, 1100], PAPER, 20_000, seed=seed) for seed in range(3)]

    def layers(overlap):
        x = cases[0].q
        tiles = replace(DecodeTiles.of(16, 128, 128, x.dtype, x.device), overlap=overlap)
        found = []
        for i in range(30):
            case = cases[i % 3]
            args = (*case.kv, case.gates, case.query, case.window_key, case.longest, PAPER)
            x, indices = kernels(x, *args, scale=case.scale, tiles=tiles)
            dense = full_kernels(x, *case.kv[2:4], case.query, None, scale=case.scale, overlap=overlap)
            x = x + 30 * dense  # far from the mean of all values, so that the layers' choices stay their own
            found += [x, indices]
        return found

    want = layers(False)
    assert not torch.equal(want[1], want[7])
    runs = [layers(True) for _ in range(5)]
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = layers(True)
        runs = []
        for _ in range(20):
            captured.replay()
            runs.append([x.clone() for x in out])
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, want))


@pytest.mark.parametrize("kind", ["nsa", "full", "window"])
def test_a_replayed_graph_follows_the_lengths(kind):
    """Captured at short lengths; to the bit what launching anew gives, since nothing depends on lengths but the data."""
    case = draw(Shape.parse("16/4/128/128"), [700, 40], PAPER, capacity=20_000)

    def step():
        if kind == "nsa":
            return kernels(case.q, *case.kv, case.gates, case.query, case.window_key, 20_000, PAPER, scale=case.scale)[0]
        window = 512 if kind == "window" else None
        return cached_attention(case.q, *case.kv[2:4], case.query, None, scale=case.scale, window=window, impl="triton")

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seen = []
    for lengths in ([700, 40], [1023, 1024], [1025, 64], [19_999, 1], [5000, 20_000]):
        case.query.copy_(torch.tensor(lengths)[:, None] - 1)
        graph.replay()
        assert torch.equal(out, step()), lengths
        seen.append(out.clone())
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_nothing_waits_for_the_device():
    case = draw(Shape.parse("16/4/128/128"), [700, 40], PAPER)
    args = (case.q, *case.kv, case.gates, case.query, case.window_key, case.longest, PAPER)
    nsa_decode(*args, scale=case.scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nsa_decode(*args, scale=case.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
