"""The whole operator on a GPU in half precision, held to the rule of conftest.check_accuracy, and to the bit.

Each test stays below 8 GB of GPU memory, so that several may run at once; the large ones are in test_limits_gpu.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa.geometry import Geometry  # noqa: E402
from sieve.kernels.nsa.layout import CompressedSlots  # noqa: E402
from sieve.kernels.nsa.phi import PhiWeights, compress  # noqa: E402

pytestmark = pytest.mark.gpu

SIZES = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "init_blocks": 1, "local_blocks": 2}
PAPER = Geometry(**SIZES, topk=16, window_size=512)
SHORT = Geometry(**SIZES, topk=5, window_size=100)

SHAPES = [  # query heads, KV heads, d_qk, d_v: groups of 16, 16, 3, 5, 7, 12, 64, 6, 1, 4
    (16, 1, 128, 128), (64, 4, 192, 128), (12, 4, 80, 96), (5, 1, 64, 64), (7, 1, 32, 256), (12, 1, 256, 192),
    (64, 1, 96, 64), (12, 2, 64, 128), (4, 4, 128, 32), (16, 4, 128, 128),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_half_precision(shape, dtype, dense, op, poison):
    """Documents of more blocks than topk (500), of fewer than topk (123), of no compressed block (31, 1), and none."""
    op.check(op.draw(655, *shape, SHORT, "cuda", dtype), dense.pack([500, 1, 0, 123, 31], "cuda"), SHORT)


GEOMETRIES = [  # l, d, l', n, initial, local, w
    (16, 16, 16, 64, 0, 1, 33), (32, 16, 32, 24, 1, 2, 512), (64, 32, 128, 8, 1, 2, 1), (32, 16, 96, 5, 2, 3, 64),
    (48, 16, 48, 16, 1, 1, 200), (32, 32, 64, 3, 0, 2, 128),
]  # fmt: skip


@pytest.mark.parametrize("sizes", GEOMETRIES, ids=str)
def test_geometries(sizes, dense, op, poison):
    geometry = Geometry(*sizes)
    inputs = op.draw(1427, 8, 2, 64, 64, geometry, "cuda", torch.bfloat16)
    # Where every query sees one key of the window, dq and dk of that branch are differences of two equal sums.
    op.check(inputs, dense.pack([1300, 127], "cuda"), geometry, floor=1e-4 if geometry.window_size == 1 else 0.0)


def test_fp32_is_exact_to_fp32(dense, op, poison):
    inputs = op.draw(500, 8, 2, 64, 64, SHORT, "cuda")
    op.check(inputs, dense.pack([400, 100], "cuda"), SHORT, floor=1e-5)


def test_forty_documents(dense, op, poison):
    lengths = torch.randint(0, 100, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    lengths[17] = 500
    inputs = op.draw(sum(lengths), 8, 2, 64, 64, SHORT, "cuda", torch.bfloat16)
    op.check(inputs, dense.pack(lengths, "cuda"), SHORT)


def special(kind, op):
    """Inputs of one document of 1300 tokens."""
    inputs = op.draw(1300, 16, 2, 64, 128, SHORT, "cuda", torch.bfloat16)
    q, *keys = inputs[0], *inputs[1:7:2]
    with torch.no_grad():
        if kind == "logits of a hundred":  # of the random ones the largest, 64 ** -0.5 * q k, is about 6
            logits = torch.einsum("tkgd,nkd->tkgn", q.unflatten(1, (2, 8)).float(), torch.cat(keys).float())
            q.mul_(100 * 64**0.5 / logits.abs().max())
        elif kind == "equal keys":
            q.round_()
            for k in keys:
                k.fill_(1.0)
        else:  # every query wants block 3, and its compressed keys
            q[..., 0] = 16.0
            keys[0][12:15, :, 0] = 8.0
    return inputs


@pytest.mark.parametrize("kind", ["logits of a hundred", "equal keys", "one block for all"])
def test_special_inputs(kind, dense, op, poison):
    # Equal keys leave q no gradient, so that there is nothing for its error to be relative to.
    skip = ("q",) if kind == "equal keys" else ()
    _, indices, grads = op.check(special(kind, op), dense.pack([1300], "cuda"), SHORT, skip=skip)
    if kind == "equal keys":
        assert indices[1290:].tolist() == [[[0, 1, 2, 19, 20]] * 2] * 10
        assert grads[0].abs().max() < 0.02
    if kind == "one block for all":
        assert (indices[256:] == 3).any(-1).all()


def test_one_set_of_keys_and_values(dense, op, poison):
    """One K/V for the selection and window branches: the same output, and both branches' gradients in one."""
    packing = dense.pack([900], "cuda")
    inputs = op.draw(900, 16, 1, 128, 128, SHORT, "cuda", torch.bfloat16)
    shared = [*inputs[:5], *inputs[3:5], inputs[7]]
    out, indices, grads = op.run(shared, packing, SHORT)
    apart = [*shared[:5], *(x.detach().clone().requires_grad_() for x in shared[5:7]), shared[7]]
    want, _, separate = op.run(apart, packing, SHORT)
    assert torch.equal(out, want)
    for i in (3, 4):  # autograd adds the two up in bf16
        assert torch.equal(grads[i], separate[i] + separate[i + 2]) and torch.equal(grads[i], grads[i + 2])


@pytest.mark.parametrize("lengths", [[1], [20], [1, 1, 1], [31, 15], [32], [5]], ids=str)
def test_hardly_any_token(lengths, dense, op, poison):
    inputs = op.draw(sum(lengths), 4, 2, 64, 64, PAPER, "cuda", torch.bfloat16)
    _, indices, _ = op.check(inputs, dense.pack(lengths, "cuda"), PAPER, floor=1e-2)
    assert (indices[:, :, 0] == 0).all() and (indices[:, :, 1:] == -1).all()


@pytest.mark.parametrize("heads", [64, 16])  # of 4 KV heads: selection by unions, and by lists
def test_runs_and_slices_and_rows_are_bit_equal(heads, dense, op):
    packing = dense.pack([8192, 8192], "cuda")
    inputs = op.draw(16384, heads, 4, 128, 128, PAPER, "cuda", torch.bfloat16)
    do = op.cotangent(inputs)
    out, indices, grads = op.run(inputs, packing, PAPER, do)
    for options in ({}, {}, {"save_outputs": False}):
        out2, indices2, grads2 = op.run(inputs, packing, PAPER, do, **options)
        assert torch.equal(out, out2) and torch.equal(indices, indices2)
        for name, a, b in zip(op.names, grads, grads2):
            assert torch.equal(a, b), name
    half = [x.detach()[: x.shape[0] // 2].clone().requires_grad_() for x in inputs]
    out2, indices2, _ = op.run(half, dense.pack([8192], "cuda"), PAPER, do[:8192])
    assert torch.equal(out[:8192], out2) and torch.equal(indices[:8192], indices2)


@pytest.mark.parametrize("shape", [(16, 1, 128, 128), (8, 2, 64, 64)], ids=str)
def test_a_document_does_not_feel_the_batch(shape, dense, op):
    """At a multiple of 1024 tokens, where all tiles begin, to the bit; elsewhere to rounding."""
    lengths = [1024, 900, 600]
    packing = dense.pack(lengths, "cuda")
    inputs = op.draw(sum(lengths), *shape, SHORT, "cuda", torch.bfloat16)
    do = op.cotangent(inputs)
    out, indices, grads = op.run(inputs, packing, SHORT, do)
    for first, length, exact in ((1024, 900, True), (1924, 600, False)):
        at = slice(first, first + length)
        slots = slice(first // 16, first // 16 + length // 16)
        alone = [x.detach()[slots if i in (1, 2) else at].clone().requires_grad_() for i, x in enumerate(inputs)]
        out2, indices2, grads2 = op.run(alone, dense.pack([length], "cuda"), SHORT, do[at])
        assert torch.equal(indices[at], indices2)
        assert torch.equal(out[at], out2) if exact else dense.relative_errors(out[at], out2)[0] < 1e-2
        assert torch.equal(grads[0][at], grads2[0]) if exact else dense.relative_errors(grads[0][at], grads2[0])[0] < 1e-2
        for i, (a, b) in enumerate(zip(grads, grads2)):
            assert dense.relative_errors(a[slots if i in (1, 2) else at], b)[0] < 1e-2, op.names[i]


def raw_tokens(packing, geometry, heads, kv_heads, d):
    """The operator as a function of raw tokens x [T, heads + 7 * kv_heads, d], compressed by phi: out, indices."""
    from sieve.kernels.nsa.triton_ops import nsa_attention

    g = torch.Generator("cuda").manual_seed(7)
    slots = CompressedSlots.of(packing, geometry.kernel_size, geometry.kernel_stride)
    shapes = (geometry.kernel_size, d), (2 * d, geometry.kernel_size * d), (d, 2 * d)
    position, w_in, w_out = (torch.randn(s, device="cuda", generator=g).bfloat16() / s[-1] ** 0.5 for s in shapes)
    phi = PhiWeights("mlp", position=position, w_in=w_in, w_out=w_out)

    def run(x):
        q, *kv = x.split([heads] + [kv_heads] * 6, 1)
        k_cmp, v_cmp = (compress(y, slots, geometry, phi) for y in kv[:2])
        gates = q[..., :3].sigmoid()
        return nsa_attention(q, k_cmp, v_cmp, *kv[2:6], gates, packing, geometry, scale=d**-0.5)

    return run, torch.randn(packing.total_tokens, heads + 6 * kv_heads, d, device="cuda", generator=g).bfloat16()


@pytest.mark.parametrize("heads, kv_heads", [(16, 1), (8, 2)])
def test_causal_and_isolated_bit_for_bit(heads, kv_heads, dense):
    """Later tokens, through phi too, and other documents move no bit of an output or an index."""
    lengths = [333, 1200, 500]
    packing = dense.pack(lengths, "cuda")
    run, x = raw_tokens(packing, SHORT, heads, kv_heads, 128)
    out, indices = run(x)
    for position in (0, 30, 31, 32, 63, 64, 700, 1100):
        changed = x.clone()
        hidden = torch.ones(len(x), dtype=torch.bool, device="cuda")
        hidden[333 : 333 + position + 1] = False
        changed[hidden] = 3 * torch.randn_like(changed[hidden])
        out2, indices2 = run(changed)
        assert torch.equal(out[~hidden], out2[~hidden]) and torch.equal(indices[~hidden], indices2[~hidden])
        assert not torch.equal(out[hidden], out2[hidden])


def test_gradients_stay_in_the_past_of_the_document(dense):
    lengths = [333, 700, 100]
    packing = dense.pack(lengths, "cuda")
    run, x = raw_tokens(packing, SHORT, 16, 1, 64)
    x.requires_grad_()
    at = torch.arange(len(x), device="cuda")
    for token in (332, 333, 364, 900, 1032, 1033):
        (grad,) = torch.autograd.grad(run(x)[0][token].float().sum(), x)
        allowed = (packing.doc == packing.doc[token]) & (at <= token)
        assert not grad[~allowed].any() and grad[token].any()
