from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sieve.train import parity
from sieve.train.callbacks.check import Parity
from sieve.train.parity import RanksDisagree, check_parity, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_element_and_its_place_count(dtype):
    torch.manual_seed(0)
    values = torch.randn(999).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, (999,)).to(dtype)
    base = fingerprint(values)
    assert fingerprint(values.clone()) == base
    for place in (0, 500, 998):
        other = values.clone()
        other[place] = ~other[place] if dtype == torch.bool else other[place] + 1
        assert fingerprint(other) != base
    swapped = values.clone()
    first, second = 0, int((values != values[0]).nonzero()[0])
    swapped[[first, second]] = swapped[[second, first]]
    assert fingerprint(swapped) != base


def test_a_sign_of_zero_counts():
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))


def test_long_tensors_go_in_parts(monkeypatch):
    values = torch.randn(1000)
    whole = fingerprint(values)
    monkeypatch.setattr(parity, "_CHUNK", 7)
    assert fingerprint(values) == whole


def test_what_differs_is_named(monkeypatch):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert check_parity(module) == 7

    def other_rank(values):
        high = values.clone()
        high[1] += 1
        return values, high

    monkeypatch.setattr(parity, "extremes", other_rank)
    with pytest.raises(RanksDisagree, match="the ranks hold different 0.bias: a device or a collective"):
        check_parity(module)


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4]), (0, [])])
def test_it_is_done_when_due(every, expected):
    run, called = SimpleNamespace(step=0), []
    callback = Parity(every, lambda: called.append(run.step))
    for run.step in range(1, 6):
        callback.step(run, None)
    assert called == expected
