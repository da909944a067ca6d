from __future__ import annotations

import pytest

from sieve.train.zero import ZeroConfig, deepspeed_config


def config(stage: int, dtype: str = "fp32", clip: float = 0.5, **batch) -> dict:
    sizes = {"global_batch": 12, "micro_batch": 2, "world_size": 3} | batch
    return deepspeed_config(ZeroConfig(stage=stage), dtype=dtype, clip=clip, **sizes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_batch_sizes_multiply_up(stage):
    made = config(stage)
    assert made["train_batch_size"] == 12 == (
        made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 3
    )


def test_clipping_is_left_to_the_engine_where_deepspeed_hides_the_norm():
    assert [config(stage)["gradient_clipping"] for stage in range(4)] == [0.0, 0.5, 0.5, 0.5]


def test_bf16_accumulates_in_fp32():
    assert config(1, "bf16")["data_types"] == {"grad_accum_dtype": "fp32"} and config(1, "bf16")["bf16"]["enabled"]
    assert "data_types" not in config(1) and not config(1)["bf16"]["enabled"]


def test_no_optimizer_is_left_to_deepspeed():
    for stage in range(4):
        assert "optimizer" not in config(stage) and config(stage)["zero_allow_untested_optimizer"]
