"""The bias from scores: against a loop in float64, and what it does to the load."""

import pytest
import torch

from sieve.model.balance import balanced_bias, sample


def naive_round(scores, bias, top_k):
    """One round, token by token and expert by expert, for whole shares."""
    tokens, experts = scores.shape
    share = tokens * top_k // experts
    assert share * experts == tokens * top_k
    prices = []
    for row in (scores + bias).tolist():
        row = sorted(row, reverse=True)
        prices.append((row[top_k - 1] + row[top_k]) / 2)
    new = []
    for e in range(experts):
        margins = sorted((scores[t, e].item() - prices[t] for t in range(tokens)), reverse=True)
        new.append(-(margins[share - 1] + margins[share]) / 2)
    new = torch.tensor(new, dtype=scores.dtype)
    return new - new.mean()


def skewed(tokens, experts, spread, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(n, experts, generator=generator, dtype=torch.float64) for n in (1, tokens)]
    return torch.sigmoid(normal[0] + spread * normal[1]).to(dtype)


def load_max(router, scores):
    """Of the router's own choice, when its scores are these."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(scores.shape[1]))
    load = router(scores.logit()).load
    return (load.max() / load.mean()).item()


@pytest.mark.parametrize("experts, top_k", [(8, 2), (12, 5), (4, 1), (6, 5)])
def test_against_a_loop(experts, top_k):
    scores = skewed(48, experts, 0.4, dtype=torch.float64)
    bias = 0.1 * torch.randn(experts, dtype=torch.float64)
    wanted = bias
    for rounds in (1, 2, 3):
        wanted = naive_round(scores, wanted, top_k)
        torch.testing.assert_close(balanced_bias(scores, bias, top_k, rounds=rounds), wanted, rtol=1e-12, atol=1e-12)


NO_GROUPS, EIGHT = dict(num_groups=1, top_groups=1), dict(num_groups=8, top_groups=4)


@pytest.mark.parametrize(("groups", "spread", "updates"), [
    (NO_GROUPS, 0.003, 3), (NO_GROUPS, 0.3, 3), (EIGHT, 0.3, 15), pytest.param(EIGHT, 0.003, 60, marks=pytest.mark.slow),
], ids=str)
def test_skewed_scores_are_spread_evenly(moe, groups, spread, updates):
    """Other tokens of the same kind than the bias was taken from; groups take more updates, each moving all others."""
    from sieve.model.router import Router, update_biases

    router = Router(56, moe(num_experts=56, top_k=6, bias_update="quantile", bias_update_rate=1.0, **groups))
    scores = skewed(8000, 56, spread)  # 430 of each half to an expert, so that chance stays well below the limit
    seen, unseen = scores.chunk(2)
    assert load_max(router, unseen) > 4
    for _ in range(updates):
        update_biases([router], [seen])
    assert load_max(router, unseen) < 1.3
    assert abs(router.bias.mean().item()) < 1e-6


def test_a_share_that_is_no_whole_number_of_tokens():
    scores = skewed(101, 7, 0.5)
    bias = balanced_bias(scores, torch.zeros(7), 3, rounds=60)
    load = torch.bincount((scores + bias).topk(3, -1).indices.flatten(), minlength=7)
    assert load.min() >= 41 and load.max() <= 46  # 43.3 each


@pytest.mark.parametrize("groups", [{}, dict(num_groups=4, top_groups=2)], ids=str)
def test_rows_that_are_no_tokens(groups):
    """As if they were not there, wherever they stand; without any token the bias stays as it is."""
    scores, bias = skewed(60, 8, 0.4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    real = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.7
    masked = sample(scores, 60, real)
    assert masked.isnan().any(-1).sum() == (~real).sum()
    wanted = balanced_bias(scores[real], bias, 3, **groups)
    torch.testing.assert_close(balanced_bias(masked, bias, 3, **groups), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(balanced_bias(torch.full_like(scores, torch.nan), bias, 3, **groups), bias)


def test_layers_at_once_are_as_one_by_one():
    scores = torch.stack([skewed(64, 8, spread) for spread in (0.1, 0.5)])
    scores[1, 10:20] = torch.nan
    bias = torch.randn(2, 8)
    both = balanced_bias(scores, bias, 2)
    for i in range(2):
        assert torch.equal(both[i], balanced_bias(scores[i], bias[i], 2))


def test_order_and_cuts_of_the_tokens_do_not_matter():
    scores, bias = skewed(640, 8, 0.4), torch.randn(8)
    assert torch.equal(balanced_bias(scores, bias, 2), balanced_bias(scores[torch.randperm(640)], bias, 2))


@pytest.mark.parametrize("groups, top_k", [
    (dict(num_groups=4, top_groups=2), 4), (dict(num_groups=8, top_groups=3), 3), (dict(num_groups=2, top_groups=1), 4),
], ids=str)
def test_any_division_into_groups_stays_finite_and_of_mean_zero(groups, top_k):
    scores, bias = skewed(800, 8, 0.4), torch.zeros(8)
    bias = balanced_bias(scores, bias, top_k, **groups, rounds=200)
    assert bias.isfinite().all() and abs(bias.mean().item()) < 1e-6


def test_every_expert_chosen_leaves_the_bias_alone():
    bias = torch.randn(4)
    assert torch.equal(balanced_bias(skewed(20, 4, 0.3), bias, 4), bias)


@pytest.mark.parametrize("tokens, limit, rows", [(10, 10, 10), (11, 10, 6), (8192, 4096, 4096), (5, 1, 1)])
def test_a_sample_is_evenly_spaced_and_lies_apart(tokens, limit, rows):
    scores = torch.rand(tokens, 3, requires_grad=True)
    kept = sample(scores, limit)
    assert kept.shape == (rows, 3) and not kept.requires_grad
    assert torch.equal(kept[-1], scores[(rows - 1) * -(-tokens // limit)])
    assert kept.untyped_storage().nbytes() == rows * 3 * 4
