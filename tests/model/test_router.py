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


def test_the_proportional_update_by_hand(moe):
    router = router_of(moe(bias_update="proportional", bias_update_rate=0.1))
    router.update_bias(torch.tensor([8.0, 4.0, 4.0, 0.0]))
    torch.testing.assert_close(router.bias, 0.1 * torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    before = router.bias.clone()
    for load in (torch.full((4,), 7.0), torch.zeros(4)):  # even, and a step that was skipped
        router.update_bias(load)
    assert torch.equal(router.bias, before)


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


def by_groups(wanted, num_groups, top_groups, top_k):
    """Token by token: the groups of the largest sums of two, then the largest scores within them."""
    chosen = []
    for row in wanted.tolist():
        size = len(row) // num_groups
        score = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
        kept = sorted(range(num_groups), key=lambda g: -score[g])[:top_groups]
        inside = [e for e in range(len(row)) if e // size in kept]
        chosen.append(sorted(inside, key=lambda e: -row[e])[:top_k])
    return chosen


@pytest.mark.parametrize("groups, top_groups, top_k", [(4, 2, 3), (8, 3, 6), (2, 1, 8), (16, 5, 4)])
def test_group_limited_routing_against_a_loop(moe, groups, top_groups, top_k):
    router = router_of(moe(num_experts=16, num_groups=groups, top_groups=top_groups, top_k=top_k))
    router.bias.copy_(0.3 * torch.randn(16))
    x = torch.randn(60, 8)
    routes = router(x)
    scores = torch.sigmoid(x @ router.weight.T).detach()
    assert routes.experts.tolist() == by_groups(scores + router.bias, groups, top_groups, top_k)
    weights = scores.gather(1, routes.experts)
    torch.testing.assert_close(routes.weights, weights / weights.sum(1, keepdim=True))
    free = router_of(moe(num_experts=16, top_k=top_k))
    free.bias.copy_(router.bias)
    assert torch.equal(free(x).experts, routes.experts) == (groups == 16)  # groups of one expert: five hold the best four


def test_all_groups_are_no_limit(moe):
    x = torch.randn(40, 8)
    limited = router_of(moe(num_experts=16, num_groups=4, top_groups=4, top_k=5))
    assert torch.equal(limited(x).experts, router_of(moe(num_experts=16, top_k=5))(x).experts)


def test_z_loss_by_hand_and_its_gradient(moe):
    router = router_of(moe(z_loss_coef=0.3))
    x = torch.randn(30, 8)
    real = torch.arange(30) < 20
    z = torch.logsumexp(x @ router.weight.T, -1).square()
    torch.testing.assert_close(router(x).aux_loss, 0.3 * z.mean())
    torch.testing.assert_close(router(x, real).aux_loss, 0.3 * z[:20].mean())
    (grad,) = torch.autograd.grad(router(x).aux_loss, router.weight)
    torch.testing.assert_close(grad, torch.autograd.grad(0.3 * z.mean(), router.weight)[0])


def test_both_is_the_bias_and_the_loss(moe):
    router = router_of(moe(balance="both", aux_coef=0.5))
    router.bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    routes = router(torch.randn(50, 8))
    assert routes.experts.unique().tolist() == [0, 1] and routes.aux_loss > 0
    assert router_of(moe())(torch.randn(5, 8)).aux_loss is None


def test_z_loss_adds_to_the_balance_loss(moe):
    x = torch.randn(30, 8)
    both, z, balance = (
        router_of(moe(**changes))(x).aux_loss
        for changes in ({"balance": "aux", "z_loss_coef": 0.1}, {"z_loss_coef": 0.1}, {"balance": "aux"})
    )
    torch.testing.assert_close(both, z + balance)


@pytest.mark.parametrize("changes, message", [
    ({"num_groups": 3}, "num_groups=3 does not divide num_experts=4; it may be one of \\[1, 2, 4\\]"),
    ({"num_groups": 2, "top_groups": 3}, "top_groups=3 is more than num_groups=2; choose top_groups <= num_groups"),
    ({"num_groups": 4}, "top_k=2 is more than the 1 experts that top_groups=1 of num_groups=4 groups hold; raise top_groups"),
    ({"impl": "fast"}, "impl\n.*'auto', 'torch', 'mixed' or 'triton'"),
    ({"z_loss_coef": -1.0}, "z_loss_coef"),
    ({"bias_update": "quantile", "bias_update_rate": 1.5}, "bias_update_rate=1.5 with bias_update=quantile .* at most 1"),
    ({"bias_update": "quantile", "bias_update_rate": 0.0}, "bias_update_rate=0.0 with bias_update=quantile .* more than 0"),
    ({"bias_settle": 5}, "bias_settle=5 has no meaning with balance=bias and bias_update=sign; choose bias_update=quantile"),
    ({"bias_settle": 5, "bias_update": "quantile", "balance": "aux"}, "balance=aux and bias_update=quantile"),
    ({"bias_tokens": 0}, "bias_tokens"),
], ids=str)  # fmt: skip
def test_mistakes_name_the_key_and_the_way_out(moe, changes, message):
    with pytest.raises(ValueError, match=message):
        moe(**changes)


def test_the_rate_follows_the_rule_unless_it_is_given(moe):
    assert moe().bias_update_rate == moe(bias_update="proportional").bias_update_rate == 1e-3
    assert moe(bias_update="quantile").bias_update_rate == 1.0
    assert moe(bias_update="quantile", bias_update_rate=0.25).bias_update_rate == 0.25


def test_a_sample_is_kept_by_one_rule_while_training(moe):
    x, real = torch.randn(30, 8), torch.arange(30) < 20
    router = router_of(moe(bias_update="quantile", bias_tokens=15))
    kept = router(x, real).sample
    scores = torch.sigmoid(x @ router.weight.T)[::2]
    assert torch.equal(kept[:10], scores[:10]) and kept[10:].isnan().all() and not kept.requires_grad
    assert router.eval()(x).sample is None
    for changes in ({}, {"bias_update": "proportional"}, {"bias_update": "quantile", "balance": "aux"}):
        assert router_of(moe(**changes))(x).sample is None
