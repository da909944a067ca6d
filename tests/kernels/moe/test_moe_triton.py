"""The Triton kernels of the experts against float64, in Triton's interpreter where there is no GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from sieve.kernels.moe import gemm, reference  # noqa: E402
from sieve.kernels.moe.api import routed_experts  # noqa: E402
from sieve.kernels.moe.sort import sort_routes  # noqa: E402

SPREADS = ("even", "one", "few")


def choose(tokens, num_experts, top_k, spread, seed=0):
    """Distinct experts for each token: any, always the same, or the first top_k + 1 alone."""
    g = torch.Generator().manual_seed(seed)
    reach = {"even": num_experts, "one": top_k, "few": min(num_experts, top_k + 1)}[spread]
    return torch.rand(tokens, reach, generator=g).argsort(1)[:, :top_k]


def draw(tokens, hidden, num_experts, top_k, size, spread, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, hidden), (num_experts, 2 * size, hidden), (num_experts, hidden, size), (tokens, hidden)
    x, gate_up, down, probe = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    gate_up, down = gate_up * hidden**-0.5, down * size**-0.5
    weights = torch.rand(tokens, top_k, generator=g)
    leaves = [t.to(device, dtype).requires_grad_() for t in (x, gate_up, down)] + [weights.to(device).requires_grad_()]
    return leaves, choose(tokens, num_experts, top_k, spread, seed).to(device), probe.to(device, dtype)


def run(leaves, experts, probe, impl):
    x, gate_up, down, weights = leaves
    out = routed_experts(x, gate_up, down, experts, weights, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe)]


def exact(leaves, experts, probe):
    """Expert by expert in float64."""
    x, gate_up, down, weights = (t.detach().double().requires_grad_() for t in leaves)
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        weight = (weights * (experts == e)).sum(1)
        gate, up = (x @ gate_up[e].T).chunk(2, -1)
        out = out + (torch.nn.functional.silu(gate) * up * weight[:, None]) @ down[e].T
    return [out.detach(), *torch.autograd.grad(out, (x, gate_up, down, weights), probe.double())]


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("tokens, num_experts, top_k", [(1, 1, 1), (1, 6, 2), (37, 5, 2), (129, 8, 3), (64, 2, 2)])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("fill, tile", [(False, 128), (True, 16)])
def test_the_sort_is_the_reference(tokens, num_experts, top_k, spread, fill, tile, device):
    experts = choose(tokens, num_experts, top_k, spread)
    weights = torch.rand(tokens, top_k)
    wanted = reference.group_by_expert(experts, num_experts, tile)
    slot, source, scale, ends = sort_routes(experts.to(device), weights.to(device), num_experts, tile, fill=fill)
    assert torch.equal(slot.cpu().long().view(tokens, top_k), wanted.slot)
    assert torch.equal(source.cpu().long(), wanted.source)
    assert torch.equal(ends.cpu()[:-1], wanted.ends[:-1]) and (ends[-1] == wanted.ends[-1] or not fill)
    assert torch.equal(scale.cpu()[wanted.slot], weights) and scale.sum().item() == pytest.approx(weights.sum().item())


SHAPES = [
    (1, 16, 1, 1, 8, "even"), (1, 24, 6, 2, 16, "even"), (70, 40, 5, 2, 24, "even"), (131, 32, 4, 1, 72, "one"),
    (50, 136, 7, 3, 8, "few"), (16, 64, 9, 4, 264, "one"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["triton", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_against_float64(shape, impl, device, poison):
    leaves, experts, probe = draw(*shape, device)
    got, want = run(leaves, experts, probe, impl), exact(leaves, experts, probe)
    for name, a, b in zip(("out", "dx", "dgate_up", "ddown", "dweights"), got, want):
        assert a.dtype == torch.float32 and a.isfinite().all(), name
        assert relative(a, b) < 3e-6, name
    for e in range(shape[2]):
        if not (experts == e).any():
            assert not got[2][e].any() and not got[3][e].any()


def test_torch_is_the_same_function(device):
    leaves, experts, probe = draw(70, 40, 5, 2, 24, "few", device)
    for a, b in zip(run(leaves, experts, probe, "torch"), exact(leaves, experts, probe)):
        assert relative(a, b) < 3e-6


def test_fp16(device):
    leaves, experts, probe = draw(60, 64, 4, 2, 32, "even", device, torch.float16)
    want = exact(leaves, experts, probe)
    plain = run(leaves, experts, probe, "mixed")
    for a, b, yardstick in zip(run(leaves, experts, probe, "triton"), want, plain):
        assert relative(a, b) < max(2 * relative(yardstick, b), 2e-3)


@pytest.mark.parametrize("impl", ["triton", "mixed"])
def test_later_tokens_move_no_bit_of_earlier_ones(impl, device):
    """Neither of the output nor, where the later tokens' gradients are left as they are, of the gradient of x."""
    (x, gate_up, down, weights), experts, probe = draw(60, 32, 4, 2, 24, "even", device)
    wanted = run((x, gate_up, down, weights), experts, probe, impl)
    for kept in (1, 20, 59):
        other, routes, scale = x.detach().clone(), experts.clone(), weights.detach().clone()
        other[kept:] += 1
        routes[kept:] = torch.tensor([3, 1], device=device)
        scale[kept:] *= 2
        leaves = [other.requires_grad_(), gate_up, down, scale.requires_grad_()]
        got = run(leaves, routes, probe, impl)
        for i in (0, 1, 4):
            assert torch.equal(got[i][:kept], wanted[i][:kept])


def test_products_alone(device, poison):
    """All four uses, with memory of NaN past the last expert's rows."""
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([128, 384, 512], dtype=torch.int32)
    a, b = torch.randn(640, 40, generator=g), torch.randn(640, 72, generator=g)
    a[512:], b[512:] = torch.nan, torch.nan
    w, v = torch.randn(3, 72, 40, generator=g), torch.randn(3, 40, 72, generator=g)
    parts = [(0, 128), (128, 384), (384, 512)]
    a, b, w, v, ends = (t.to(device) for t in (a, b, w, v, ends))
    got = gemm.rows_times_weights(a, w, ends, transposed=True)[:512]
    want = torch.cat([a[i:j].double() @ w[e].double().T for e, (i, j) in enumerate(parts)])
    assert relative(got, want) < 3e-6
    got = gemm.rows_times_weights(a, v, ends, transposed=False)[:512]
    assert relative(got, torch.cat([a[i:j].double() @ v[e].double() for e, (i, j) in enumerate(parts)])) < 3e-6
    got = gemm.rows_times_rows(a, b, ends)
    assert relative(got, torch.stack([a[i:j].double().T @ b[i:j].double() for i, j in parts])) < 3e-6
    index = torch.randint(0, 51, (640,), generator=g, dtype=torch.int32).to(device)  # 50: padding
    few = torch.randn(50, 40, generator=g).to(device)
    rows = torch.cat([few, few.new_zeros(1, 40)])[index.long()].double()
    got = gemm.rows_times_weights(few, w, ends, transposed=True, index=index, rows=640)[:512]
    assert relative(got, torch.cat([rows[i:j] @ w[e].double().T for e, (i, j) in enumerate(parts)])) < 3e-6
    for got, want in (
        (gemm.rows_times_rows(few, b, ends, a_index=index), [rows[i:j].T @ b[i:j].double() for i, j in parts]),
        (gemm.rows_times_rows(b, few, ends, b_index=index), [b[i:j].double().T @ rows[i:j] for i, j in parts]),
    ):
        assert relative(got, torch.stack(want)) < 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "mixed"])
@pytest.mark.parametrize("shape", [
    (8192, 1024, 64, 8, 256, "even"), (4099, 1024, 64, 6, 512, "few"), (2048, 768, 32, 4, 384, "one"),
    (1, 1024, 64, 8, 256, "even"),
], ids=str)  # fmt: skip
def test_gpu_errors_are_those_of_bf16_and_two_runs_are_bit_equal(shape, impl):
    leaves, experts, probe = draw(*shape, "cuda", torch.bfloat16)
    want, plain = exact(leaves, experts, probe), run(leaves, experts, probe, "torch")
    got, again = (run(leaves, experts, probe, impl) for _ in range(2))
    for name, a, b, c, yardstick in zip(("out", "dx", "dgate_up", "ddown", "dweights"), got, again, want, plain):
        assert torch.equal(a, b), name
        assert relative(a, c) <= max(2 * relative(yardstick, c), 1e-2), name


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "mixed"])
def test_gpu_later_tokens_move_no_bit(impl):
    (x, gate_up, down, weights), experts, _ = draw(3000, 1024, 64, 8, 256, "even", "cuda", torch.bfloat16)
    with torch.no_grad():
        wanted = routed_experts(x, gate_up, down, experts, weights, impl=impl)
        for kept in (1, 100, 2048, 2999):
            other, routes = x.clone(), experts.clone()
            other[kept:] += 1
            routes[kept:] = torch.arange(8, device="cuda")
            assert torch.equal(routed_experts(other, gate_up, down, routes, weights, impl=impl)[:kept], wanted[:kept])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "mixed"])
def test_gpu_waits_for_nothing(impl):
    leaves, experts, probe = draw(300, 256, 8, 2, 128, "even", "cuda", torch.bfloat16)
    run(leaves, experts, probe, impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves, experts, probe, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
