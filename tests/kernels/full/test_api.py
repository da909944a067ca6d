"""Full and window attention: every implementation against the naive loop, and what the front door refuses."""

import logging
import os

import pytest
import torch

from sieve.kernels.common import log
from sieve.kernels.full import api
from sieve.kernels.full.reference import causal_attention
from sieve.kernels.full.sdpa import sdpa_attention

PACKED = [5, 0, 1, 33, 0, 64, 1, 0, 50, 7]
impls = pytest.mark.parametrize("impl", ["sdpa", "reference"])


def leaves(lengths, heads=4, kv_heads=2, dim_qk=6, dim_v=4, dtype=torch.float64, std=1.0, device="cpu"):
    rng = torch.Generator().manual_seed(0)

    def draw(h, d):
        return (std * torch.randn(sum(lengths), h, d, dtype=torch.float64, generator=rng)).to(device, dtype)

    qkv = draw(heads, dim_qk), draw(kv_heads, dim_qk), draw(kv_heads, dim_v)
    return [x.requires_grad_() for x in qkv], draw(heads, dim_v) / std


def check(naive, packed, lengths, window, **kw):
    qkv, cotangent = leaves(lengths, **kw)
    scale = qkv[0].shape[2] ** -0.5
    want, lse = naive.attention(*qkv, lengths, scale, window)
    wants = [want, *torch.autograd.grad(want, qkv, cotangent)]
    for impl in ("sdpa", "reference"):
        out = api.attention(*qkv, packed(lengths), scale=scale, window=window, impl=impl)
        for g, w in zip([out, *torch.autograd.grad(out, qkv, cotangent)], wants):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(causal_attention(*qkv, packed(lengths), window, scale=scale)[1], lse)


@pytest.mark.parametrize("window", [None, 1, 16, 50])
@pytest.mark.parametrize("lengths", [[1], [31], [33], PACKED], ids=str)
def test_lengths(naive, packed, lengths, window):
    check(naive, packed, lengths, window)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("heads, kv_heads, dim_qk, dim_v", [(2, 2, 4, 4), (4, 2, 4, 8), (6, 2, 12, 8), (3, 1, 2, 1)])
def test_heads(naive, packed, window, heads, kv_heads, dim_qk, dim_v):
    check(naive, packed, [20, 40], window, heads=heads, kv_heads=kv_heads, dim_qk=dim_qk, dim_v=dim_v)


def test_logits_of_a_hundred(naive, packed):
    check(naive, packed, [40], None, std=10.0)


@pytest.mark.parametrize("window", [None, 16])
def test_triton_is_the_same_within_rounding(naive, packed, window):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or Triton's interpreter")
    qkv, cotangent = leaves(PACKED, dim_qk=32, dim_v=32, dtype=torch.float32, device=device)
    found = []
    for impl in ("reference", "triton", "triton"):
        out = api.attention(*qkv, packed(PACKED, device), scale=0.2, window=window, impl=impl)
        found.append([out, *torch.autograd.grad(out, qkv, cotangent)])
    for want, got, again in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(got, again)


@pytest.mark.parametrize("window", [None, 40])
def test_the_chunk_only_rounds(packed, window):
    qkv, cotangent = leaves([150, 0, 31])
    runs = [causal_attention(*qkv, packed([150, 0, 31]), window, scale=0.4, chunk=c)[0] for c in (1000, 1, 7, 64)]
    if window:
        runs += [sdpa_attention(*qkv, packed([150, 0, 31]), window, scale=0.4, chunk=c) for c in (7, 1000)]
    (want, *wants), *others = ([x, *torch.autograd.grad(x, qkv, cotangent)] for x in runs)
    for got, *grads in others:
        for g, w in zip([got, *grads], [want, *wants]):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@impls
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("position", [0, 63, 64, 200, 511, 512, 698])
def test_later_tokens_and_other_documents_change_no_bit(packed, impl, window, position):
    lengths = [40, 700, 33]
    (qkv, _), packing = leaves(lengths, dim_qk=8, dim_v=8, dtype=torch.float32), packed(lengths)
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[40 + position + 1 :] = 3 * torch.randn_like(x[40 + position + 1 :])
        x[:40] += 1
    a, b = (api.attention(*xs, packing, scale=0.4, window=window, impl=impl) for xs in (qkv, changed))
    assert torch.equal(a[40 : 40 + position + 1], b[40 : 40 + position + 1])
    assert not torch.equal(a[40 + position + 1 :], b[40 + position + 1 :])


@impls
@pytest.mark.parametrize("window", [None, 16])
def test_gradients_stay_in_the_past_of_the_document(packed, impl, window):
    lengths = [20, 50, 9]
    qkv, _ = leaves(lengths)
    out = api.attention(*qkv, packed(lengths), scale=0.4, window=window, impl=impl)
    for token, first in ((0, 0), (19, 0), (20, 20), (45, 20), (69, 20), (70, 70)):
        low = first if window is None else max(first, token - window + 1)
        _, value = torch.autograd.grad(out[token].sum(), qkv[1:], retain_graph=True)
        assert value.flatten(1).any(1).nonzero().flatten().tolist() == list(range(low, token + 1))


@impls
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)])
def test_dtypes(packed, impl, dtype, tolerance):
    (qkv, _), packing = leaves([100, 40], dtype=dtype), packed([100, 40])
    out = api.attention(*qkv, packing, scale=0.4, window=30, impl=impl)
    want, _ = causal_attention(*(x.double() for x in qkv), packing, 30, scale=0.4)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change, message", [
    ({"q": torch.zeros(12, 24)}, r"q must be \[T, heads, head_dim\], got \[12, 24\]"),
    ({"q": torch.zeros(12, 3, 6)}, r"q has 3 heads \[12, 3, 6\], not divisible by the 2 of k \[12, 2, 6\]"),
    ({"k": torch.zeros(12, 2, 5)}, r"k must be \[12, 2, 6\] beside q \[12, 4, 6\], got \[12, 2, 5\]"),
    ({"v": torch.zeros(11, 2, 4)}, r"v must be \[12, 2, Dv\]"),
    ({"v": torch.zeros(12, 2, 4).bfloat16()}, "v is torch.bfloat16, q is torch.float32"),
    ({"k": torch.zeros(12, 2, 6, device="meta")}, "k is on meta, q on cpu"),
    ({"window": 0}, "window=0 must be at least 1"),
    ({"impl": "flash"}, "impl='flash' is not one of auto, varlen, cudnn, triton, sdpa, reference"),
    ({"impl": "varlen"}, "impl='varlen' cannot be had: the tensors are on cpu, it needs cuda"),
])
def test_what_is_refused(packed, change, message):
    kw = {"q": torch.zeros(12, 4, 6), "k": torch.zeros(12, 2, 6), "v": torch.zeros(12, 2, 4), "packing": packed([5, 7])}
    with pytest.raises(ValueError, match=message):
        api.attention(**(kw | {"scale": 1.0} | change))


def test_a_packing_of_another_row(packed):
    q, k, v = (torch.zeros(12, n, 4) for n in (4, 2, 2))
    with pytest.raises(ValueError, match=r"packing lays out 13 tokens, q \[12, 4, 4\] has 12"):
        api.attention(q, k, v, packed([13]), scale=1.0)


def test_auto_says_once_what_it_chose(packed, caplog):
    log._log.cache_clear()
    q, k, v = (torch.zeros(12, n, 4) for n in (4, 2, 2))
    with caplog.at_level(logging.INFO, logger=api.__name__):
        for window in (None, 4, None, 4):
            api.attention(q, k, v, packed([12]), scale=1.0, window=window)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("full attention: sdpa") and messages[1].startswith("window attention: sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dim_qk, dim_v", [(64, 64), (96, 64), (64, 128), (20, 12)])
@pytest.mark.parametrize("lengths", [[512, 512], [1, 0, 300, 33, 600, 0]], ids=str)
def test_varlen_on_the_gpu(packed, window, dim_qk, dim_v, lengths):
    qkv, cotangent = leaves(lengths, 8, 2, dim_qk, dim_v, torch.bfloat16, device="cuda")
    packing, scale = packed(lengths, "cuda"), dim_qk**-0.5
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want, _ = causal_attention(*exact, packing, window, scale=scale)
    wants = [want, *torch.autograd.grad(want, exact, cotangent.double())]
    for impl in ("varlen", "reference") if window else ("varlen", "reference", "sdpa"):
        out = api.attention(*qkv, packing, scale=scale, window=window, impl=impl)
        for g, w in zip([out, *torch.autograd.grad(out, qkv, cotangent)], wants):
            assert ((g.double() - w).norm() / w.norm()).item() < 1e-2, impl


@pytest.mark.gpu
def test_auto_on_the_gpu_does_not_wait_for_it(packed):
    qkv, cotangent = leaves([300, 212], 8, 2, 64, 64, torch.bfloat16, device="cuda")
    packing = packed([300, 212], "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(api.attention(*qkv, packing, scale=0.1), qkv, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [None, 8])
def test_traces_to_one_graph_as_on_a_gpu(window):
    """Through fake CUDA tensors, which need no GPU; what is chosen is logged from within the trace too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sieve.kernels.nsa.layout import Packing

    graphs = []
    with FakeTensorMode():
        q, k, v = (torch.empty(12, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        cu, at = (torch.empty(n, device="cuda", dtype=torch.int32) for n in (3, 12))
        packing = Packing(cu, at, at, 8)

        def call(q, k, v):
            return api.attention(q * 1, k, v, packing, scale=0.1, window=window)

        torch._dynamo.reset()
        backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
        out = torch.compile(call, fullgraph=True, backend=backend)(q, k, v)
    assert out.shape == (12, 4, 64) and len(graphs) == 1
    assert any("varlen" in str(node.target) for node in graphs[0].graph.nodes)


def test_the_compiler_breaks_its_graph_around_plain_pytorch(packed):
    """Which reads the documents' lengths on the host."""
    qkv, cotangent = leaves([7, 5])
    packing = packed([7, 5])

    def call(q, k, v):
        return api.attention(q * 2, k, v, packing, scale=0.4) * 3

    torch._dynamo.reset()
    eager, compiled = (f(*qkv) for f in (call, torch.compile(call, backend="aot_eager")))
    assert torch.equal(eager, compiled)
    for a, b in zip(*(torch.autograd.grad(out, qkv, cotangent) for out in (eager, compiled))):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dim_v", [64, 96])
def test_compiles_in_one_graph_on_the_gpu(packed, dim_v):
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(packing, q, k, v):
        return api.attention(q * 1.0, k, v, packing, scale=0.1) * 2.0

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for lengths in ([300, 212], [100, 500, 1], [77, 600]):
        qkv, cotangent = leaves(lengths, 8, 2, 64, dim_v, torch.bfloat16, device="cuda")
        outs = [f(packed(lengths, "cuda"), *qkv) for f in (call, compiled)]
        assert torch.equal(*outs)
        for a, b in zip(*(torch.autograd.grad(out, qkv, cotangent) for out in outs)):
            assert ((a - b).norm() / a.norm()).item() < 1e-2  # FlashAttention's own backward need not repeat
    assert counter.frame_count == 2
