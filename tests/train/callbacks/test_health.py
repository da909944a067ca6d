import pytest
import torch

from sieve.train.callbacks.health import Health


def test_records_get_plain_numbers(make_state) -> None:
    state = make_state(
        health={"nsa/layer_01/gate_cmp": torch.tensor(0.25), "nsa/layer_02/gate_cmp": torch.tensor(float("nan"))},
        expert_load={2: torch.tensor([1.0, 3.0])},
        step_load={2: torch.tensor([1.0, 1.0])},
        router_bias={2: torch.tensor([0.0, 2.0])},
    )
    record: dict = {"step": 1}
    Health().step(state, record)
    assert record == {
        "step": 1, "nsa/layer_01/gate_cmp": 0.25, "moe/layer_02/load_max": pytest.approx(1.5),
        "moe/layer_02/load_max_step": pytest.approx(1.0),
        "moe/layer_02/load_cv": pytest.approx(0.5), "moe/layer_02/bias_norm": pytest.approx(2.0),
        "moe/layer_02/entropy": pytest.approx(0.811278, abs=1e-6),
    }
    assert all(isinstance(value, (int, float)) for value in record.values())
    Health().step(state, None)
