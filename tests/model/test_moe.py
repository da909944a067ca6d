import pytest
import torch

from sieve.kernels.moe.reference import TILE, group_by_expert
from sieve.model.moe import Experts, MoE


def moe_of(config, hidden=16, seed=0):
    layer = MoE(hidden, config)
    torch.manual_seed(seed)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def naive(layer, x):
    """Token by token and expert by expert."""
    routes = layer.router(x)
    rows = []
    for t in range(len(x)):
        total = layer.shared(x[t]) if layer.shared is not None else 0
        for e, w in zip(routes.experts[t].tolist(), routes.weights[t]):
            gate, up = (layer.experts.gate_up[e] @ x[t]).chunk(2)
            total = total + w * (layer.experts.down[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("changes", [
    {}, {"num_shared": 0, "top_k": 1}, {"num_experts": 9, "top_k": 4, "num_shared": 2, "routed_scale": 1.7},
    {"score": "softmax", "balance": "aux"},
], ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
def test_against_a_loop(moe, changes, tokens):
    layer = moe_of(moe(**changes))
    x = torch.randn(tokens, 16, requires_grad=True)
    out, aux = layer(x)
    wanted = naive(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert aux["load"].sum() == tokens * layer.router.config.top_k
    assert ("aux_loss" in aux) == (layer.router.config.balance == "aux")
    probe = torch.randn_like(out)
    inputs = (x, *layer.parameters())
    grads = torch.autograd.grad((out * probe).sum(), inputs)
    expected = torch.autograd.grad((wanted * probe).sum(), inputs, allow_unused=True)
    for got, want in zip(grads, expected):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-4, atol=1e-5)


def test_an_idle_expert_has_a_gradient_of_zeros(moe):
    layer = Experts(16, moe())
    torch.manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, visited = torch.randn(20, 16), torch.tensor([3, 1]).expand(20, 2)
    layer(x, visited, torch.rand(20, 2)).sum().backward()
    for p in layer.parameters():
        assert p.grad[1].any() and p.grad[3].any() and not p.grad[0].any() and not p.grad[2].any()


def test_grouping():
    experts = torch.tensor([[2, 0], [2, 1], [0, 2]])
    slot, source, ends = group_by_expert(experts, 4)
    # Experts 0, 1, 2 fill one tile each, the idle one has a tile of padding, and the last also takes what is left.
    assert ends.dtype == torch.int32 and ends[:3].tolist() == [TILE, 2 * TILE, 3 * TILE] and ends[3] == len(source)
    assert slot.tolist() == [[2 * TILE, 0], [2 * TILE + 1, TILE], [1, 2 * TILE + 2]]
    assert source[slot].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (source == 3).sum() == len(source) - 6 and len(source) % TILE == 0


@pytest.mark.parametrize("experts, top_k, tokens", [(1, 1, 1), (5, 5, 16), (8, 1, 129), (3, 2, 500)])
def test_grouping_always_fits(experts, top_k, tokens):
    for routes in (torch.zeros(tokens, top_k, dtype=torch.int64), torch.rand(tokens, experts).argsort(1)[:, :top_k]):
        slot, source, ends = group_by_expert(routes, experts)
        start = torch.cat([ends.new_zeros(1), ends[:-1]])
        assert (ends > start).all() and (ends % TILE == 0).all()
        assert ((slot >= start[routes]) & (slot < ends[routes])).all() and slot.unique().numel() == slot.numel()
        assert torch.equal(source[slot], torch.arange(tokens)[:, None].expand(-1, top_k))


def test_later_tokens_move_no_bit_of_earlier_ones(moe):
    """They change how many rows each expert gets, and with that the shapes of the matrix products."""
    layer = moe_of(moe(num_experts=8, expert_size=24), hidden=64)
    torch.manual_seed(0)
    x = torch.randn(90, 64)
    with torch.no_grad():
        wanted = layer(x)[0]
        for kept in (1, 2, 3, 7, 20, 50, 89):
            other = torch.cat([x[:kept], torch.randn(90 - kept, 64)])
            assert torch.equal(layer(other)[0][:kept], wanted[:kept])


def test_autocast(moe):
    layer = moe_of(moe())
    x = torch.randn(30, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer(x)
    torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
