"""One training run, described. Hydra composes the settings (sieve.train.overrides); here they are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.phases import Phase, phases_of, steps_for
from sieve.model.config import AttentionConfig, Config, LossConfig, ModelConfig
from sieve.train.callbacks.check import CheckConfig
from sieve.train.callbacks.checkpoint import CheckpointConfig
from sieve.train.callbacks.evaluate import EvalConfig
from sieve.train.callbacks.profile import ProfileConfig
from sieve.train.callbacks.wandb import LoggerConfig
from sieve.train.callbacks.watchdog import WatchdogConfig
from sieve.train.guard import GuardConfig
from sieve.train.optim import OptimConfig
from sieve.train.schedule import ScheduleConfig, steps_of
from sieve.train.schema import shown
from sieve.train.zero import ZeroConfig


class LogConfig(Config):
    every: int = Field(10, gt=0, description="steps from one line of metrics.jsonl to the next; the last step has one")


class RunConfig(Config):
    """What `sieve train` takes. Sizes of batches are in rows (sequences) of seq_len tokens."""

    name: str | None = Field(None, description="the run's folder under runs_dir; null: MODEL-ATTENTION-DATA")
    runs_dir: str = Field("runs", min_length=1)
    steps: int | None = Field(None, gt=0, description="optimizer steps; null: as tokens says, or 1000")
    tokens: int | None = Field(None, gt=0, description="instead of steps: tokens to train on, rounded up to a step")
    seq_len: int = Field(1024, gt=0, description="tokens of a row")
    global_batch: int = Field(8, gt=0, description="rows of a step, all processes together")
    micro_batch: int = Field(1, gt=0, description="rows that a process computes at once")
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the order of documents")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the computation; bf16 keeps fp32 master weights")
    compile: Literal["auto"] | bool = Field("auto", description="the layers by torch.compile; auto: on CUDA, not at zero=3")
    activation_checkpointing: Literal["none", "attention", "block", "full"] = Field(
        "none", description="what is computed again in the backward: nothing; all but attention; layers; NSA's branches, too"
    )
    activation_offload: bool = Field(False, description="checkpointed layers' inputs wait in host memory")
    resume: str = Field("auto", description="auto: the newest checkpoint; never: anew; a step; or a checkpoint's path")
    init: str | None = Field(None, description="a folder with weights to begin with: exported, Llama or Qwen3")
    resume_mismatch: Literal["refuse", "allow"] = Field("refuse", description="when the checkpoint had other settings")
    baseline: str | None = Field(None, description="a run to compare with while training: its folder or name")
    baseline_mismatch: Literal["refuse", "mark"] = Field("refuse", description="when the baseline read other tokens")
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    check: CheckConfig = CheckConfig()
    profile: ProfileConfig = ProfileConfig()
    loss: LossConfig = LossConfig()
    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    logger: LoggerConfig = LoggerConfig()

    @field_validator("resume", mode="before")
    @classmethod
    def _step_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("profile", mode="before")
    @classmethod
    def _profile_as_switch(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str | None) -> str | None:
        if value is not None and (not value or value.startswith(".") or "/" in value):
            raise ValueError("must be a folder's name, with no '/' and not beginning with '.'; runs_dir says where")
        return value

    @model_validator(mode="after")
    def _steps_or_tokens(self) -> RunConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps={self.steps} and tokens={self.tokens} are both given; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _batch_multiplies_up(self) -> RunConfig:
        for where, phase in self._named_phases():
            if phase.global_batch % phase.micro_batch:
                allowed = [n for n in range(1, phase.global_batch + 1) if phase.global_batch % n == 0]
                raise ValueError(
                    f"{where}global_batch={phase.global_batch} is not divisible by micro_batch={phase.micro_batch}; "
                    f"micro_batch may be one of {', '.join(map(str, allowed))}"
                )
        return self

    @model_validator(mode="after")
    def _precision_has_masters(self) -> RunConfig:
        if self.dtype == "bf16" and self.zero.stage == 0:
            raise ValueError(
                "dtype=bf16 with zero.stage=0 keeps no fp32 master weights; choose zero=1, 2 or 3, also for one "
                "process, or dtype=fp32"
            )
        return self

    @model_validator(mode="after")
    def _offloads_inputs(self) -> RunConfig:
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "activation_offload=true with activation_checkpointing=none, which keeps far more than the layers' inputs; "
                "choose activation_checkpointing=block, full or attention, or activation_offload=false"
            )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> RunConfig:
        if self.compile is True and self.zero.stage == 3:
            raise ValueError(
                "compile=true with zero.stage=3, which gathers each weight by hooks that cannot be traced; choose zero=1 "
                "or 2, or compile=false"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> RunConfig:
        types = self.attention.layer_types(self.model.num_layers)
        for where, phase in self._named_phases():
            if "nsa" in types and phase.seq_len < self.attention.kernel_size:
                raise ValueError(
                    f"{where}seq_len={phase.seq_len} is less than attention.kernel_size={self.attention.kernel_size}, so "
                    f"no row has a compressed block; choose seq_len >= {self.attention.kernel_size}, or a smaller "
                    "kernel_size"
                )
        if "nsa" in types and self.attention.dense_len and self.zero.stage > 1:
            raise ValueError(
                f"attention.dense_len={self.attention.dense_len} with zero.stage={self.zero.stage}: its collectives follow "
                "the order in which a rank uses its weights, which dense and sparse calls do not share; choose zero=0 or "
                "1, or dense_len=0"
            )
        return self

    @model_validator(mode="after")
    def _tasks_fit(self) -> RunConfig:
        longest, row = max(self.eval.needle.lengths), max(phase.seq_len for phase in self.phases)
        if set(self.eval.tasks) & {"needle", "multikey", "passkey"} and longest > row:
            raise ValueError(
                f"eval.needle.lengths has {longest}, more than seq_len={row}, which the model never sees in training; "
                f"give shorter ones, as in eval.needle.lengths=[{row}]"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> RunConfig:
        if steps_of(self.schedule.warmup, self.total_steps) > self.total_steps:
            raise ValueError(
                f"schedule.warmup={self.schedule.warmup:g} steps is more than the run's {self.total_steps}; "
                "give fewer, or a share of the run below 1"
            )
        return self

    @classmethod
    def of(cls, tree: dict[str, Any]) -> RunConfig:
        """The validated config, its name filled in, so that the same command always means the same run."""
        config = cls.model_validate(tree)
        if config.name is not None:
            return config
        attention = "+".join(config.attention.layers or (config.attention.type,))
        name = f"{config.model.name}-{attention}-{config.data.name}".replace("/", "-")
        return config.model_copy(update={"name": name})

    @property
    def directory(self) -> Path:
        """Of the run: where its metrics and checkpoints lie."""
        return Path(self.runs_dir) / str(self.name)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What the run reads when: with its own sizes from the start, then as data.phases says."""
        return phases_of(
            self.data, seq_len=self.seq_len, global_batch=self.global_batch, micro_batch=self.micro_batch
        )

    def _named_phases(self) -> list[tuple[str, Phase]]:
        """The phases, each with what stands before its keys."""
        return [(f"data.phases[{i - 1}]." if i else "", phase) for i, phase in enumerate(self.phases)]

    @property
    def total_steps(self) -> int:
        """The run's length: `steps`, else as many as `tokens` take, else 1000."""
        if self.tokens is not None:
            return steps_for(self.phases, self.tokens)
        return self.steps if self.steps is not None else 1000

    def without_effect(self) -> list[str]:
        """What is asked for and never happens, each in words: allowed, since a run may be made longer or a config shared."""
        found, moe = [], self.model.moe
        if self.eval.tasks and not self.eval.every:
            found.append(f"eval.tasks={shown(list(self.eval.tasks))} are never measured, since eval.every=0")
        if moe is not None and moe.first_dense_layers >= self.model.num_layers:
            found.append(
                f"model.moe makes no mixture: model.moe.first_dense_layers={moe.first_dense_layers} of "
                f"model.num_layers={self.model.num_layers} are dense"
            )
        if moe is not None and moe.balance in ("aux", "none") and moe.bias_update != "sign":
            found.append(f"model.moe.bias_update={moe.bias_update} moves no bias with model.moe.balance={moe.balance}")
        for where, phase in self._named_phases()[1:]:
            if steps_for(self.phases, phase.from_tokens) >= self.total_steps:
                found.append(f"{where}from_tokens={phase.from_tokens} is never reached in {self.total_steps} steps")
        return found

    def dump(self) -> dict[str, Any]:
        """All of it in JSON's types, as config.yaml and the checkpoints hold it."""
        return self.model_dump(mode="json")
