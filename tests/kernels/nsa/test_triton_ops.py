"""The whole operator through Triton: outputs, every gradient, and that PyTorch may trace and checkpoint it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

from sieve.kernels.nsa import api, autograd, reference, triton_ops  # noqa: E402
from sieve.kernels.nsa.geometry import Geometry  # noqa: E402

GEOMETRY = Geometry(
    kernel_size=8, kernel_stride=4, block_size=16, topk=3, init_blocks=1, local_blocks=1, window_size=12
)
NAMES = "q k_cmp v_cmp k_slc v_slc k_win v_win gates".split()


def draw(tokens, heads, kv_heads, d_qk, d_v, geometry, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    slots = tokens // geometry.kernel_stride
    shapes = [(tokens, heads, d_qk)] + [(n, kv_heads, d) for n in (slots, tokens, tokens) for d in (d_qk, d_v)]
    inputs = [torch.randn(s, generator=g) for s in shapes] + [torch.rand(tokens, heads, 3, generator=g)]
    return [x.to(device, dtype).requires_grad_() for x in inputs]


def loss_weights(out):
    g = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=g).to(out.device, out.dtype)


def run(inputs, packing, geometry, **options):
    scale = inputs[0].shape[2] ** -0.5
    out, indices = triton_ops.nsa_attention(*inputs, packing, geometry, scale=scale, **options)
    return out.detach(), indices, torch.autograd.grad(out, inputs, loss_weights(out))


def plain(inputs, packing, geometry, indices, dense, dtype):
    """The dense operator in `dtype`, for given indices: output and gradients."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = dense.nsa(*inputs, packing, geometry, indices, inputs[0].shape[2] ** -0.5)
    return out.detach(), torch.autograd.grad(out, inputs, loss_weights(out).to(dtype))


@pytest.mark.parametrize("lengths, shape", [([37, 0, 1, 7], (4, 2, 32, 16)), ([5, 1], (3, 1, 48, 80))], ids=str)
def test_outputs_and_gradients(lengths, shape, device, dense, poison):
    packing = dense.pack(lengths, device)
    inputs = draw(sum(lengths), *shape, GEOMETRY, device)
    out, indices, grads = run(inputs, packing, GEOMETRY)
    with torch.no_grad():
        _, exact = reference.nsa_attention(*(x.double() for x in inputs), packing, GEOMETRY, scale=shape[2] ** -0.5)
    assert torch.equal(indices, exact)
    want, exact = plain(inputs, packing, GEOMETRY, indices, dense, torch.float64)
    assert torch.allclose(out.double(), want, atol=1e-5)
    for name, got, grad in zip(NAMES, grads, exact):
        assert torch.allclose(got.double(), grad, atol=2e-5), (name, dense.relative_errors(got, grad))


def test_recomputed_in_slices_is_bit_equal(device, dense, poison, monkeypatch):
    packing = dense.pack([13, 23], device)
    inputs = draw(36, 4, 1, 16, 16, GEOMETRY, device)
    kept = run(inputs, packing, GEOMETRY)
    monkeypatch.setattr(autograd, "SLICE_BYTES", 1)
    monkeypatch.setattr(autograd, "SLICE_TOKENS", 16)
    again = run(inputs, packing, GEOMETRY, save_outputs=False)
    for a, b in zip((*kept[:2], *kept[2]), (*again[:2], *again[2])):
        assert torch.equal(a, b)


def test_slices_cover_every_token_once():
    for tokens, size in ((1, 10), (3000, 1 << 30), (65_536, 3 * 64 * 128 * 2), (100_001, 3 * 64 * 192 * 2)):
        slices = autograd.token_slices(tokens, size)
        assert slices[0][0] == 0 and slices[-1][1] == tokens
        assert all(a[1] == b[0] and a[1] % autograd.SLICE_TOKENS == 0 for a, b in zip(slices, slices[1:]))


def arguments(inputs, packing, geometry, keep):
    sizes = [
        geometry.kernel_size, geometry.kernel_stride, geometry.block_size, geometry.topk, geometry.init_blocks,
        geometry.local_blocks, geometry.window_size,
    ]
    return (*inputs, packing.cu_seqlens, packing.doc, packing.position, packing.max_seqlen, sizes, 0.2, keep)


@pytest.mark.parametrize("keep", [True, False])
def test_registration(keep, device, dense):
    packing = dense.pack([4, 8], device)
    inputs = draw(12, 2, 1, 16, 16, GEOMETRY, device)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"] + ["test_aot_dispatch_static"] * keep
    torch.library.opcheck(triton_ops.nsa_forward, arguments(inputs, packing, GEOMETRY, keep), test_utils=checks)


def test_checkpointing_and_the_api(device, dense):
    packing = dense.pack([10, 2], device)
    inputs = draw(12, 2, 1, 16, 16, GEOMETRY, device)

    def call(*inputs):
        return api.nsa_attention(*inputs, packing, GEOMETRY, scale=0.25, impl="triton")[0]

    grads = torch.autograd.grad(call(*inputs), inputs, loss_weights(inputs[0]))
    again = torch.autograd.grad(checkpoint(call, *inputs, use_reentrant=False), inputs, loss_weights(inputs[0]))
    for a, b in zip(grads, again):
        assert torch.equal(a, b)


def test_compiles_in_one_graph(device, dense):
    packing = dense.pack([8, 4], device)
    inputs = draw(12, 2, 1, 16, 16, GEOMETRY, device)

    def call(*inputs):
        out, indices = triton_ops.nsa_attention(*(x * 1.0 for x in inputs), packing, GEOMETRY, scale=0.25)
        return out * 2.0, indices

    eager, compiled = (f(*inputs) for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")))
    for a, b in zip(eager, compiled):
        assert torch.equal(a, b)
    for a, b in zip(*(torch.autograd.grad(out[0].square().sum(), inputs) for out in (eager, compiled))):
        assert torch.equal(a, b)


def test_causal_and_isolated_bit_for_bit(device, dense):
    """What comes later and what other documents hold moves no bit of the output, of indices or of earlier dq."""
    packing = dense.pack([16, 20], device)
    inputs = draw(36, 2, 1, 16, 16, GEOMETRY, device)
    out, indices, grads = run(inputs, packing, GEOMETRY)
    later = slice(28, 36), slice(7, 9), slice(0, 28)
    other = slice(0, 16), slice(0, 4), slice(16, 36)
    for hidden, slots, same in (later, other):
        changed = [x.detach().clone() for x in inputs]
        for x, at in zip(changed[1:7], (slots, slots, *[hidden] * 4)):
            x[at] = 5.0
        changed[0][hidden] = -3.0
        out2, indices2, grads2 = run([x.requires_grad_() for x in changed], packing, GEOMETRY)
        assert torch.equal(out2[same], out[same]) and torch.equal(indices2[same], indices[same])
        assert torch.equal(grads2[0][same], grads[0][same])


def test_scale_and_dims_are_checked(device, dense):
    packing = dense.pack([4], device)
    inputs = draw(4, 2, 1, 16, 16, GEOMETRY, device)
    with pytest.raises(ValueError, match="scale=0"):
        triton_ops.nsa_attention(*inputs, packing, GEOMETRY, scale=0)
    with pytest.raises(ValueError, match="head dimension 24"):
        run(draw(4, 2, 1, 24, 16, GEOMETRY, device), packing, GEOMETRY)
