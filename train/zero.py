"""ZeRO's stages and what DeepSpeed is told: its configuration, worked out from ours."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sieve.model.config import Config


class ZeroConfig(Config):
    """What is split between the ranks: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too."""

    stage: Literal[0, 1, 2, 3] = 1
    bucket_size: int = Field(50_000_000, gt=0, description="elements that are reduced or gathered at once")


def deepspeed_config(
    zero: ZeroConfig, *, dtype: Literal["fp32", "bf16"], clip: float,
    global_batch: int, micro_batch: int, world_size: int, cuda: bool = False,
) -> dict[str, Any]:
    """The DeepSpeed configuration. The batch sizes are rows; micro_batch * world_size divides global_batch.

    In bf16 gradients are accumulated and reduced in fp32. gradient_clipping is 0 at stage 0 in fp32, where DeepSpeed
    would clip and not tell the norm: the engine clips there itself. So it does on a GPU (`cuda`) in bf16 at stages 1 and
    2, where DeepSpeed reads the norm and whether a gradient is infinite on the host before it clips; see Engine.
    """
    clips = zero.stage > 0 and not (cuda and dtype == "bf16" and zero.stage < 3)
    zero_optimization: dict[str, Any] = {"stage": zero.stage}
    if zero.stage:
        zero_optimization |= {
            "reduce_bucket_size": zero.bucket_size,
            "allgather_bucket_size": zero.bucket_size,
            "overlap_comm": zero.stage == 3,  # at stages 1 and 2 it copies to buckets on a second stream for little
        }
    if zero.stage == 2 and not clips:  # the norm would be made with a copy that waits; stage 1 has no such switch
        zero_optimization["compute_grad_norm"] = False
    if zero.stage == 3:
        zero_optimization |= {
            "stage3_prefetch_bucket_size": zero.bucket_size,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": global_batch // (micro_batch * world_size),
        "gradient_clipping": clip if clips else 0.0,
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled at start
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": clips},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at both ends of every micro-batch
    }
    if dtype == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
