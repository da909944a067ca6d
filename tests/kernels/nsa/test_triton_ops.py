"""The whole operator through Triton: outputs, every gradient, and what must not move a bit of them."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa import api, autograd, reference, triton_ops  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.layout import CompressedSlots, Packing  # noqa: E402
from sieve.kernels.nsa.phi import PhiWeights, compress  # noqa: E402

GEOMETRY = Geometry(
    kernel_size=8, kernel_stride=4, block_size=16, topk=3, init_blocks=1, local_blocks=1, window_size=12
)


def check(inputs, packing, geometry, dense, op, tolerance=2e-5, **options):
    """Indices as the reference's; the output and every gradient of fp32 inputs against float64."""
    got, indices, grads = op.run(inputs, packing, geometry, **options)
    scale = inputs[0].shape[2] ** -0.5
    with torch.no_grad():
        _, chosen = reference.nsa_attention(*(x.double() for x in inputs), packing, geometry, scale=scale)
    assert torch.equal(indices, chosen)
    want, exact = op.plain(inputs, packing, geometry, indices, torch.float64)
    for name, a, b in zip(("out", *op.names), (got, *grads), (want, *exact)):
        assert torch.allclose(a.double(), b, atol=tolerance, rtol=1e-5), (name, dense.relative_errors(a, b))
    return got, indices, grads


@pytest.mark.parametrize("lengths, shape", [
    ([37, 0, 1, 7], (4, 2, 32, 16)), ([5, 1], (3, 1, 48, 80)), ([3], (2, 2, 16, 32)), ([9], (6, 1, 192, 16)),
], ids=str)  # fmt: skip
def test_outputs_and_gradients(lengths, shape, device, dense, op, poison):
    """More blocks than topk, fewer, not a compressed block, not even a stride."""
    check(op.draw(sum(lengths), *shape, GEOMETRY, device), dense.pack(lengths, device), GEOMETRY, dense, op)


def test_forty_documents(device, dense, op, poison):
    lengths = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    lengths[17] = 33
    check(op.draw(sum(lengths), 2, 1, 16, 16, GEOMETRY, device), dense.pack(lengths, device), GEOMETRY, dense, op)


def test_no_token_at_all(device, op):
    packing = Packing.of(torch.zeros(3, dtype=torch.int32, device=device), 0, 0)
    out, indices, grads = op.run(op.draw(0, 4, 2, 16, 32, GEOMETRY, device), packing, GEOMETRY)
    assert out.shape == (0, 4, 32) and indices.shape == (0, 2, 3) and not any(g.numel() for g in grads)


def test_logits_of_a_hundred(device, dense, op, poison):
    packing = dense.pack([40], device)
    inputs = op.draw(40, 2, 1, 16, 16, GEOMETRY, device)
    with torch.no_grad():
        inputs[0].mul_(100 * 4 / torch.einsum("thd,nkd->thn", inputs[0], torch.cat(inputs[1:6:2])).abs().max())
    check(inputs, packing, GEOMETRY, dense, op, 2e-4)


def test_equal_keys_choose_the_lowest_blocks(device, dense, op, poison):
    packing = dense.pack([70], device)
    inputs = op.draw(70, 4, 1, 16, 16, GEOMETRY, device)
    with torch.no_grad():
        inputs[0].round_()  # products exact in any order
        for k in inputs[1:7:2]:
            k.fill_(1.0)
    _, indices, grads = check(inputs, packing, GEOMETRY, dense, op)
    assert indices[64:, 0].tolist() == [[0, 1, 4]] * 6 and grads[0].abs().max() < 1e-5


def test_one_block_that_every_query_wants(device, dense, op, poison):
    packing = dense.pack([70], device)
    inputs = op.draw(70, 4, 1, 16, 16, GEOMETRY, device)
    with torch.no_grad():
        inputs[0][..., 0] = 8.0
        inputs[1][8:11, :, 0] = 8.0  # the compressed blocks within [32, 48)
    _, indices, _ = check(inputs, packing, GEOMETRY, dense, op, 1e-4)
    assert (indices[48:] == 2).any(-1).all()


def test_one_set_of_keys_and_values(device, dense, op, poison):
    """Shared by the selection and window branches: the gradient is the sum of what two sets get."""
    packing = dense.pack([30, 6], device)
    inputs = op.draw(36, 4, 2, 16, 32, GEOMETRY, device)
    shared = [*inputs[:5], *inputs[3:5], inputs[7]]
    out, _ = triton_ops.nsa_attention(*shared, packing, GEOMETRY, scale=0.25)
    apart = [*shared[:5], *(x.detach().clone().requires_grad_() for x in shared[5:7]), shared[7]]
    want, _, grads = op.run(apart, packing, GEOMETRY)
    assert torch.equal(out, want)
    for got, a, b in zip(torch.autograd.grad(out, shared[3:5], op.cotangent(inputs)), grads[3:5], grads[5:7]):
        assert torch.allclose(got, a + b, atol=1e-6)


def through_phi(x, phi_k, phi_v, packing, geometry, attend):
    """x: as the operator's inputs, but raw tokens [T, Hkv, D] for the compression branch's keys and values."""
    q, k, v, *rest = x
    slots = CompressedSlots.of(packing, geometry.kernel_size, geometry.kernel_stride)
    weights = (PhiWeights("mlp", position=w[0], w_in=w[1], w_out=w[2]) for w in (phi_k, phi_v))
    return attend(q, *(compress(y, slots, geometry, w) for y, w in zip((k, v), weights)), *rest)


def draw_phi(d, geometry, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(d)
    fan_in, hidden = geometry.kernel_size * d, 2 * d
    shapes = (geometry.kernel_size, d), (hidden, fan_in), (d, hidden)
    sizes = 0.5, fan_in**-0.5, 2 * hidden**-0.5
    return [(s * torch.randn(n, generator=g)).to(device, dtype).requires_grad_() for n, s in zip(shapes, sizes)]


def phi_case(lengths, shape, geometry, device, dtype, dense, op):
    """Gradients of raw keys and values and of phi's weights and position embeddings: ours, in float64, and plain."""
    packing = dense.pack(lengths, device)
    inputs = op.draw(sum(lengths), *shape, geometry, device, dtype)
    raw = [op.draw(sum(lengths), *shape, geometry, device, dtype, seed=2)[i] for i in (3, 4)]  # a token each
    leaves = [inputs[0], *raw, *inputs[3:], *draw_phi(shape[2], geometry, device, dtype)]
    leaves += draw_phi(shape[3], geometry, device, dtype)
    do, scale = op.cotangent(inputs), shape[2] ** -0.5
    chosen = []

    def ours(*x):
        out, indices = triton_ops.nsa_attention(*x, packing, geometry, scale=scale)
        chosen.append(indices)
        return out

    def plain(*x):
        return dense.nsa(*x, packing, geometry, chosen[0], scale)

    results = []
    for attend, to in ((ours, dtype), (plain, torch.float64), (plain, dtype)):
        x = [y.detach().to(to).requires_grad_() for y in leaves]
        out = through_phi(x[:8], x[8:11], x[11:], packing, geometry, attend)
        wanted = [*x[1:3], *x[8:]]
        results.append((out.detach(), *torch.autograd.grad(out, wanted, do.to(to))))
    return *results, ("out", "k", "v", *(f"{w} of {x}" for x in "kv" for w in ("position", "w_in", "w_out")))


def test_gradients_of_phi(device, dense, op):
    got, exact, _, names = phi_case([30, 6], (4, 2, 16, 32), GEOMETRY, device, torch.float32, dense, op)
    for name, a, b in zip(names, got, exact):
        assert b.any() and dense.relative_errors(a, b)[0] < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 1, 128, 128), (8, 2, 192, 64)], ids=str)
def test_gpu_gradients_of_phi(shape, dense, op):
    geometry = Geometry(32, 16, 64, 5, 1, 2, 100)
    got, exact, plain, names = phi_case([500, 1, 154], shape, geometry, "cuda", torch.bfloat16, dense, op)
    dense.check_accuracy(got, exact, plain, names)


def test_recomputed_in_slices_is_bit_equal(device, dense, op, poison, monkeypatch):
    packing = dense.pack([13, 23], device)
    inputs = op.draw(36, 4, 1, 16, 16, GEOMETRY, device)
    kept = op.run(inputs, packing, GEOMETRY)
    monkeypatch.setattr(autograd, "SLICE_BYTES", 1)
    monkeypatch.setattr(autograd, "SLICE_TOKENS", 16)
    again = op.run(inputs, packing, GEOMETRY, save_outputs=False)
    for a, b in zip((*kept[:2], *kept[2]), (*again[:2], *again[2])):
        assert torch.equal(a, b)


def test_slices_cover_every_token_once():
    for tokens, size in ((1, 10), (3000, 1 << 30), (65_536, 3 * 64 * 128 * 2), (100_001, 3 * 64 * 192 * 2)):
        slices = autograd.token_slices(tokens, size)
        assert slices[0][0] == 0 and slices[-1][1] == tokens
        assert all(a[1] == b[0] and a[1] % autograd.SLICE_TOKENS == 0 for a, b in zip(slices, slices[1:]))


def test_runs_are_bit_equal(device, dense, op):
    packing = dense.pack([20, 4], device)
    inputs = op.draw(24, 4, 2, 16, 16, GEOMETRY, device)
    first, second = (op.run(inputs, packing, GEOMETRY) for _ in range(2))
    for a, b in zip((*first[:2], *first[2]), (*second[:2], *second[2])):
        assert torch.equal(a, b)


def test_a_document_does_not_feel_the_batch(device, dense, op):
    """Alone or among others: the same selection, and the same to rounding (numpy's products feel a row's place)."""
    inputs = op.draw(60, 2, 1, 16, 16, GEOMETRY, device)
    out, indices, grads = op.run(inputs, dense.pack([16, 36, 8], device), GEOMETRY)
    at, slots = slice(16, 52), slice(4, 13)
    alone = [x.detach()[slots if i in (1, 2) else at].clone().requires_grad_() for i, x in enumerate(inputs)]
    out2, indices2, grads2 = op.run(alone, dense.pack([36], device), GEOMETRY, op.cotangent(inputs)[at])
    assert torch.equal(indices[at], indices2) and torch.allclose(out[at], out2, atol=1e-6)
    for i, (a, b) in enumerate(zip(grads, grads2)):
        assert torch.allclose(a[slots if i in (1, 2) else at], b, atol=1e-5)


def test_causal_and_isolated_bit_for_bit(device, dense, op):
    """What comes later and what other documents hold moves no bit of the output, of indices or of earlier dq."""
    packing = dense.pack([16, 20], device)
    inputs = op.draw(36, 2, 1, 16, 16, GEOMETRY, device)
    out, indices, grads = op.run(inputs, packing, GEOMETRY)
    later = slice(28, 36), slice(7, 9), slice(0, 28)
    other = slice(0, 16), slice(0, 4), slice(16, 36)
    for hidden, slots, same in (later, other):
        changed = [x.detach().clone() for x in inputs]
        for x, at in zip(changed[1:7], (slots, slots, *[hidden] * 4)):
            x[at] = 5.0
        changed[0][hidden] = -3.0
        out2, indices2, grads2 = op.run([x.requires_grad_() for x in changed], packing, GEOMETRY)
        assert torch.equal(out2[same], out[same]) and torch.equal(indices2[same], indices[same])
        assert torch.equal(grads2[0][same], grads[0][same])


def test_what_is_refused(device, dense, op):
    packing = dense.pack([4], device)
    inputs = op.draw(4, 2, 1, 16, 16, GEOMETRY, device)
    with pytest.raises(ValueError, match="scale=0"):
        triton_ops.nsa_attention(*inputs, packing, GEOMETRY, scale=0)
    with pytest.raises(ValueError, match="head dimension 24"):
        op.run(op.draw(4, 2, 1, 24, 16, GEOMETRY, device), packing, GEOMETRY)
    with pytest.raises(ValueError, match="packing lays out 5 tokens"):
        api.nsa_attention(*inputs, dense.pack([5], device), GEOMETRY, scale=0.25, impl="triton")
