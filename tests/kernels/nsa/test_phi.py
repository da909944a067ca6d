"""phi against a loop over blocks written from equation 7, and what it must not mix."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.layout import CompressedSlots
from sieve.kernels.nsa.phi import PhiWeights, compress

D, HKV, HIDDEN = 3, 2, 5
LENGTHS = [5, 0, 1, 33, 0, 64, 1, 7, 8, 12, 3]
NAMES = ("position", "w_in", "b_in", "w_out", "b_out")
SHAPES = [(8, 4), (4, 4), (12, 4), (6, 3)]


def geometry(l, d):
    return Geometry(l, d, 2 * l, 4, 1, 2, 8)


def weights(kind, l, rng, biases=True):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=rng).requires_grad_()

    if kind == "mean":
        return PhiWeights("mean")
    out = HIDDEN if kind == "mlp" else D
    return PhiWeights(
        kind, position=draw(l, D), w_in=draw(out, l * D), b_in=draw(out) if biases else None,
        w_out=draw(D, HIDDEN) if kind == "mlp" else None, b_out=draw(D) if biases and kind == "mlp" else None,
    )


def leaves(w):
    return [getattr(w, name) for name in NAMES if getattr(w, name) is not None]


def naive(x, lengths, l, d, w):
    """{slot: [Hkv, D]} block by block."""
    found, first = {}, 0
    for length in lengths:
        for i in range((length - l) // d + 1 if length >= l else 0):
            tokens = x[first + i * d : first + i * d + l].transpose(0, 1)  # [Hkv, l, D]
            if w.kind == "mean":
                y = tokens.mean(1)
            else:
                y = (tokens + w.position).flatten(1) @ w.w_in.T + (0 if w.b_in is None else w.b_in)
            if w.kind == "mlp":
                y = F.silu(y) @ w.w_out.T + (0 if w.b_out is None else w.b_out)
            found[first // d + i] = y
        first += length
    return found


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("l, d", SHAPES)
@pytest.mark.parametrize("biases", [True, False])
def test_blocks_and_gradients(packed, kind, l, d, biases):
    rng = torch.Generator().manual_seed(0)
    packing = packed(LENGTHS)
    x = torch.randn(sum(LENGTHS), HKV, D, dtype=torch.float64, generator=rng).requires_grad_()
    w = weights(kind, l, rng, biases)
    got = compress(x, CompressedSlots.of(packing, l, d), geometry(l, d), w)
    assert got.shape == (sum(LENGTHS) // d, HKV, D)
    found = naive(x, LENGTHS, l, d, w)
    want = torch.stack([found.get(c, torch.zeros(HKV, D, dtype=torch.float64)) for c in range(len(got))])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn(got.shape, dtype=torch.float64, generator=rng)
    for g, e in zip(*(torch.autograd.grad(y, [x, *leaves(w)], cotangent) for y in (got, want))):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_where_nobody_reads_slots_without_a_block_the_others_are_the_same(packed, kind):
    rng = torch.Generator().manual_seed(4)
    slots = CompressedSlots.of(packed([12, 8, 4, 22]), 8, 4)
    assert not slots.valid.all()
    x, w = torch.randn(46, HKV, D, dtype=torch.float64, generator=rng), weights(kind, 8, rng)
    plain, other = (compress(x, s, geometry(8, 4), w) for s in (slots, replace(slots, any_filling=True)))
    assert torch.equal(plain[slots.valid], other[slots.valid]) and other.isfinite().all()


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_gradcheck(packed, kind):
    rng = torch.Generator().manual_seed(1)
    slots = CompressedSlots.of(packed([11, 3, 9]), 4, 2)
    x = torch.randn(23, HKV, D, dtype=torch.float64, generator=rng).requires_grad_()
    w = weights(kind, 4, rng)
    names = [n for n in NAMES if getattr(w, n) is not None]

    def run(x, *values):
        return compress(x, slots, geometry(4, 2), PhiWeights(kind, **dict(zip(names, values))))

    assert torch.autograd.gradcheck(run, (x, *leaves(w)))


def test_a_block_feels_only_its_tokens(packed):
    rng = torch.Generator().manual_seed(2)
    lengths, l, d = [10, 21, 9], 8, 4
    slots = CompressedSlots.of(packed(lengths), l, d)
    x = torch.randn(40, HKV, D, dtype=torch.float64, generator=rng).requires_grad_()
    w = weights("mlp", l, rng)
    out = compress(x, slots, geometry(l, d), w)
    for slot in range(10):
        (grad,) = torch.autograd.grad(out[slot].sum(), x, retain_graph=True)
        touched = (grad != 0).flatten(1).any(1).nonzero().flatten().tolist()
        start = int(slots.start[slot])
        assert touched == (list(range(start, start + l)) if slots.valid[slot] else [])


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("lengths", [[3], [2, 1], [4], [7]], ids=str)
def test_rows_without_a_block(packed, kind, lengths):
    x = torch.ones(sum(lengths), HKV, D, dtype=torch.float64, requires_grad=True)
    w = weights(kind, 8, torch.Generator().manual_seed(3))
    out = compress(x, CompressedSlots.of(packed(lengths), 8, 4), geometry(8, 4), w)
    assert out.shape == (sum(lengths) // 4, HKV, D) and (out == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad == 0).all()


def test_the_mean_of_half_precision_is_taken_in_fp32(packed):
    x = torch.full((32, 1, 1), 1.0, dtype=torch.bfloat16)
    x[0] = 257 * 32.0  # a bf16 sum would drop the ones
    out = compress(x, CompressedSlots.of(packed([32]), 32, 16), Geometry(32, 16, 32, 3, 1, 2, 8), PhiWeights("mean"))
    assert out.dtype == torch.bfloat16 and out[0].item() == torch.tensor((float(x[0]) + 31) / 32).bfloat16().item()


@pytest.mark.parametrize("change, message", [
    ({"w_in": torch.zeros(HIDDEN, 7 * D)}, r"w_in must be \[5, 24\].*got \[5, 21\]"),
    ({"position": torch.zeros(4, D)}, r"position must be \[8, 3\]"),
    ({"w_out": torch.zeros(D, HIDDEN + 1)}, r"w_out must be \[3, 5\]"),
    ({"w_in": None}, "needs w_in"),
    ({"kind": "conv"}, "kind='conv' is not one of mlp, linear, mean"),
])
def test_weights_that_do_not_fit(packed, change, message):
    values = {"kind": "mlp", "w_in": torch.zeros(HIDDEN, 8 * D), "w_out": torch.zeros(D, HIDDEN)} | change
    with pytest.raises(ValueError, match=message):
        compress(torch.zeros(9, HKV, D), CompressedSlots.of(packed([9]), 8, 4), geometry(8, 4), PhiWeights(**values))


def test_slots_of_another_stride(packed):
    with pytest.raises(ValueError, match="slots has 4 slots"):
        compress(torch.zeros(9, HKV, D), CompressedSlots.of(packed([9]), 8, 2), geometry(8, 4), PhiWeights("mean"))
