import copy

import pytest
import torch

from sieve.model.router import Router


def router_of(config, hidden=8, seed=0):
    router = Router(hidden, config)
    torch.manual_seed(seed)
    torch.nn.init.normal_(router.weight)
    return router


def test_sigmoid_routing_by_hand(moe):
    router = router_of(moe(routed_scale=2.5), hidden=4)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    routes = router(torch.tensor([[2.0, 1.0, 0.0, -1.0], [-1.0, -2.0, 3.0, 2.9]]))
    s = torch.sigmoid(torch.tensor([2.0, -1.0, 3.0, 2.9])).tolist()
    # Token 0: scores .88 .73 .5 .27, with the bias .88 .73 .5 1.17 -> experts 3 and 0, weighed by the scores alone.
    assert routes.experts.tolist() == [[3, 0], [3, 2]]
    wanted = [[s[1] / (s[0] + s[1]), s[0] / (s[0] + s[1])], [s[3] / (s[2] + s[3]), s[2] / (s[2] + s[3])]]
    torch.testing.assert_close(routes.weights, 2.5 * torch.tensor(wanted))
    assert routes.load.tolist() == [1, 0, 1, 2] and routes.aux_loss is None


def test_softmax_without_normalisation(moe):
    router = router_of(moe(score="softmax", normalize_top_k=False, balance="none"))
    x = torch.randn(9, 8)
    routes = router(x)
    p = torch.softmax(x @ router.weight.T, -1)
    top = p.topk(2)
    assert torch.equal(routes.experts, top.indices)
    torch.testing.assert_close(routes.weights, top.values)


def test_ties_go_to_the_lower_expert(moe):
    router = router_of(moe(num_experts=32, top_k=5))
    assert router(torch.zeros(3, 8)).experts.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_scores_are_fp32_in_a_half_precision_module(moe):
    router = router_of(moe(), hidden=64).bfloat16()
    x = torch.randn(200, 64).bfloat16()
    exact = copy.deepcopy(router).float()(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        for routes in (router(x), exact):
            assert routes.weights.dtype == torch.float32
            assert torch.equal(routes.experts, exact.experts)
            assert torch.equal(routes.weights, exact.weights)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_the_bias_stays_fp32(moe, cast):
    router = router_of(moe())
    router.bias.fill_(1.0001)
    model = torch.nn.Sequential(router)
    cast(model)
    assert router.weight.dtype != torch.float32
    assert router.bias.dtype == torch.float32 and (router.bias == torch.tensor(1.0001)).all()
    router.update_bias(torch.tensor([9.0, 1.0, 1.0, 1.0]))
    assert router.bias.dtype == torch.float32
    torch.testing.assert_close(router.bias, 1.0001 + 1e-3 * torch.tensor([-1.0, 1, 1, 1]), rtol=0, atol=1e-7)
    assert "0.bias" in model.state_dict() and cast(model) is model


def test_the_bias_balances_a_skewed_router(moe):
    router = router_of(moe(num_experts=8, bias_update_rate=0.02), hidden=16)
    with torch.no_grad():
        router.weight *= 0.3
        router.weight[:2] += 0.2  # the inputs' mean is 1, so these two get nearly everything
    x = 1 + torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))

    def spread():
        load = router(x).load
        assert load.sum() == 4000
        return (load.max() / load.mean()).item()

    before = spread()
    for _ in range(100):
        router.update_bias(router(x).load)
    assert before > 2.5 and spread() < 1.15


def test_aux_loss_by_hand_and_its_gradient(moe):
    router = router_of(moe(balance="aux", score="softmax", aux_coef=0.5))
    x = torch.randn(50, 8)
    routes = router(x)
    p = torch.softmax(x @ router.weight.T, -1)
    share = torch.bincount(p.topk(2).indices.flatten(), minlength=4) / 100
    torch.testing.assert_close(routes.aux_loss, 0.5 * 4 * (share * p.mean(0)).sum())
    routes.aux_loss.backward()
    assert router.weight.grad.any()


def test_balanced_sigmoid_scores_have_the_least_aux_loss(moe):
    router = router_of(moe(balance="aux", aux_coef=1.0), hidden=4)
    with torch.no_grad():
        router.weight.copy_(10 * torch.eye(4))
    even = router(torch.eye(4) + torch.eye(4).roll(1, 0)).aux_loss
    skewed = router(torch.tensor([[1.0, 1, 0, 0]]).expand(4, 4)).aux_loss
    assert even.item() == pytest.approx(1, rel=1e-3) and skewed > 1.3
