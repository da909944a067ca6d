from __future__ import annotations

import pytest
import torch

from sieve.train.skip import SkippableAdamW, is_bad


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_weights_moments_and_count(fused):
    """fused: as on a GPU, where the flag stays on the device."""
    torch.manual_seed(0)
    ours, plain = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    plain.load_state_dict(ours.state_dict())
    skippable = SkippableAdamW(ours.parameters(), lr=0.1, fused=fused)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=fused)
    for step in range(4):
        x = torch.randn(5, 4)
        bad = step in (0, 2)
        skippable.should_skip = lambda bad=bad: torch.tensor(bad)
        for module in (ours, plain):
            module.zero_grad()
            module(x).square().sum().backward()
        if bad:
            ours.weight.grad.fill_(float("nan"))
        else:
            adamw.step()
        skippable.step()
        for a, b in zip(ours.parameters(), plain.parameters()):
            assert torch.equal(a, b)
            theirs = adamw.state[b] or {"step": torch.zeros(()), "exp_avg": torch.zeros_like(b)}
            held = skippable.state[a] or {"step": torch.zeros(()), "exp_avg": torch.zeros_like(b)}
            assert held["step"] == theirs["step"] and torch.equal(held["exp_avg"], theirs["exp_avg"])


@pytest.mark.parametrize(("loss", "norm", "limit", "bad"), [
    (2.0, 1.0, float("inf"), False), (float("nan"), 1.0, float("inf"), True), (float("inf"), 1.0, float("inf"), True),
    (2.0, float("nan"), float("inf"), True), (2.0, float("inf"), float("inf"), True), (2.0, 1.0, 1.9, True),
])
def test_what_is_bad(loss, norm, limit, bad):
    assert bool(is_bad(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm), limit)) is bad
