"""Where sizes end: memory at 64k tokens and 64 heads, and offsets beyond 32 bits. Each test takes up to 50 GB of GPU
memory, so run this file by itself: pytest -m gpu tests/kernels/nsa/test_limits_gpu.py"""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.nsa.geometry import Geometry  # noqa: E402

pytestmark = pytest.mark.gpu

PAPER = Geometry(32, 16, 64, topk=16, init_blocks=1, local_blocks=2, window_size=512)
GB = 1e9


@pytest.fixture(autouse=True)
def empty():
    """Nothing cached from the tests before."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def nbytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("mode", ["inference", "recompute", "keep"])
@pytest.mark.parametrize("d_qk", [128, 192])
def test_memory_at_64k(mode, d_qk, dense, op):
    """Beyond inputs, outputs and gradients: 1.5 GB forward, 4 GB backward; kept branch outputs count as the latter."""
    from sieve.kernels.nsa.triton_ops import nsa_attention

    packing = dense.pack([65_536], "cuda")
    inputs = op.draw(65_536, 64, 4, d_qk, 128, PAPER, "cuda", torch.bfloat16)
    do = op.cotangent(inputs)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(mode != "inference"):
        out, indices = nsa_attention(*inputs, packing, PAPER, scale=0.09, save_outputs=mode == "keep")
    kept = 3 * nbytes(out) if mode == "keep" else 0
    extra = torch.cuda.max_memory_allocated() - start - nbytes(out, indices) - kept
    print(f"{mode}: forward {extra / GB:.2f} GB beyond inputs and outputs, and {kept / GB:.2f} GB kept")
    assert extra <= 1.5 * GB
    if mode == "inference":
        return
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, inputs, do)
    extra = torch.cuda.max_memory_allocated() - start - nbytes(out, indices, *grads)
    print(f"{mode}: backward {extra / GB:.2f} GB beyond inputs, outputs and gradients")
    assert extra <= 4 * GB


def late_rows(inputs, indices, at, geometry, dtype):
    """The operator for the queries `at` of one document alone, in `dtype`: [queries, H, Dv], and the leaves q and gates.

    They must lie where windows are whole and all topk blocks exist.
    """
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x.detach() for x in inputs)
    scale, groups = q.shape[2] ** -0.5, k_slc.shape[1]
    leaves = [x[at].to(dtype).requires_grad_() for x in (q, gates)]
    block, group = torch.arange(geometry.block_size, device=q.device), torch.arange(groups, device=q.device)[:, None]
    query, gate = leaves[0].unflatten(1, (groups, -1)), leaves[1]
    outs = []
    for row, t in enumerate(at.tolist()):
        tokens = (indices[t].long()[:, :, None] * geometry.block_size + block).flatten(1)  # [Hkv, topk * block_size]
        seen = (t + 1 - geometry.kernel_size) // geometry.kernel_stride + 1
        window = slice(t + 1 - geometry.window_size, t + 1)
        chosen = tokens.clamp(max=t)
        sides = [
            (k_cmp[:seen].transpose(0, 1), v_cmp[:seen].transpose(0, 1), None),
            (k_slc[chosen, group], v_slc[chosen, group], tokens <= t),
            (k_win[window].transpose(0, 1), v_win[window].transpose(0, 1), None),
        ]  # keys [Hkv, n, D]
        out = 0
        for i, (k, v, visible) in enumerate(sides):
            s = query[row] @ k.to(dtype).mT * scale  # [Hkv, G, n]
            s = s if visible is None else s.masked_fill(~visible[:, None], float("-inf"))
            out = out + (torch.softmax(s, -1) @ v.to(dtype)).flatten(0, 1) * gate[row, :, i, None]
        outs.append(out)
    return torch.stack(outs), leaves


@pytest.mark.parametrize(("tokens", "heads", "groups", "d_qk"), [(262_144, 64, 4, 192), (1 << 20, 16, 1, 128)])
def test_offsets_pass_int32(dense, op, tokens, heads, groups, d_qk):
    """3.2e9 elements over 256k tokens, and a million tokens: late queries against the reference on those alone."""
    from sieve.kernels.nsa.triton_ops import nsa_attention

    packing, scale = dense.pack([tokens], "cuda"), d_qk**-0.5
    inputs = op.draw(tokens, heads, groups, d_qk, 128, PAPER, "cuda", torch.bfloat16)
    assert inputs[0].numel() >= 2**31
    out, indices = nsa_attention(*inputs, packing, PAPER, scale=scale, save_outputs=False)
    at = torch.tensor([tokens - 1, tokens - 2, tokens - 64, tokens - 65, tokens - 1000, 200_003], device="cuda")
    do = torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad(out, inputs, do)
    rows = []
    for dtype in (torch.float64, torch.bfloat16):
        o, leaves = late_rows(inputs, indices, at, PAPER, dtype)
        rows.append((o.detach(), *torch.autograd.grad(o, leaves, do[at].to(dtype))))
    got = out.detach()[at], grads[0][at], grads[7][at]
    dense.check_accuracy(got, *rows, names=("out", "q", "gates"))
    here = replace(packing, doc=packing.doc[at], position=packing.position[at])
    with torch.no_grad():
        q, k = inputs[0][at], inputs[1]
        slot = torch.arange(k.shape[0], device="cuda")
        seen = slot * PAPER.kernel_stride + PAPER.kernel_size - 1 <= at[:, None]
        s = torch.einsum("tkgd,nkd->tkgn", q.double().unflatten(1, (groups, -1)), k.double()) * scale
        lse = s.masked_fill(~seen[:, None, None], float("-inf")).logsumexp(-1).flatten(1)
    dense.check_selection(indices[at], q, k, lse, here, PAPER, scale, 1e-4)
    for name, g in zip(op.names, grads):
        assert g.isfinite().all(), name


def test_offsets_of_the_window_pass_int32(dense):
    """A row of more than 2^31 elements: its last document equals the same document alone."""
    from sieve.kernels.nsa.window_bwd import window_dkv, window_dq
    from sieve.kernels.nsa.window_fwd import window_attention_fwd

    tokens, tail = 140_000, 1024
    packing = dense.pack([tokens - tail, tail], "cuda")
    q = torch.randn(tokens, 64, 256, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(tokens, 2, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 2**31
    o, lse = window_attention_fwd(q, k, v, packing, 128, scale=0.06)
    dq = window_dq(o, q, k, v, lse, lse, packing, 128, scale=0.06)
    dk, dv = window_dkv(o, q, k, v, lse, lse, packing, 128, scale=0.06)
    q, k, v, alone = q[-tail:], k[-tail:], v[-tail:], dense.pack([tail], "cuda")
    o2, lse2 = window_attention_fwd(q, k, v, alone, 128, scale=0.06)
    dk2, dv2 = window_dkv(o2, q, k, v, lse2, lse2, alone, 128, scale=0.06)
    dq2 = window_dq(o2, q, k, v, lse2, lse2, alone, 128, scale=0.06)
    for a, b in ((o, o2), (lse, lse2), (dq, dq2), (dk, dk2), (dv, dv2)):
        assert torch.allclose(a[-tail:].float(), b.float(), atol=1e-2, rtol=1e-2)
