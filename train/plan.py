"""A run on paper: parameters, FLOPs, memory and speed of what `sieve train` would do, before anything is built."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sieve.data.phases import Phase
from sieve.model.count import count_parameters, dense_flops_per_token, flops_per_token
from sieve.model.memory import KEEP, activations, growing, loss_chunk, states, workspace
from sieve.train.config import RunConfig
from sieve.train.gpus import ATTENTION, GPUS, Gpu
from sieve.train.metrics import mfu, peak_flops
from sieve.train.predict import ASSUMPTIONS, Setup, bus_rate, step_seconds

GB = 1e9
DAY = 86400.0
MEMORY_ASSUMPTIONS = (
    "memory: Triton's NSA and FlashAttention, one document a row; the CUDA context, fragmentation and NCCL's buffers are left "
    "out; what compiled layers keep as inductor's partitioner decides (at zero=3 they are not compiled)",
    "stage 3: gathered weights up to DeepSpeed's limit of 1e9 elements",
)


class PlanConfig(RunConfig):
    """What `sieve plan` takes: a run, and the machine it is to run on."""

    gpus: int = Field(1, gt=0, description="ranks the run is to have")
    gpu: Literal["h200", "h100"] = Field("h200", description="whose measured figures speeds are predicted from")
    gpu_memory_gb: float | None = Field(None, gt=0, description="of one GPU, in 1e9 bytes; null: the GPU's")
    gpus_per_node: int = Field(8, gt=0, description="GPUs that NVLink joins")
    network_gb: float | None = Field(
        None, gt=0, description="1e9 bytes a second that a GPU sends between nodes; null: 50, one adapter of 400 Gbit/s each"
    )

    @property
    def memory_bytes(self) -> float:
        return GPUS[self.gpu].memory.value if self.gpu_memory_gb is None else self.gpu_memory_gb * GB


PLAN_KEYS = frozenset(PlanConfig.model_fields) - frozenset(RunConfig.model_fields)


def plan(config: PlanConfig) -> dict[str, Any]:
    """All of it in JSON's types. Speeds are None for dtype=fp32. ValueError when the batch does not spread over the gpus."""
    vocab, gpu = config.tokenizer.vocab_size, GPUS[config.gpu]
    count = count_parameters(config.model, config.attention, vocab)
    found: dict[str, Any] = {
        "model": config.model.name, "attention": config.attention.model_dump(mode="json"), "vocab": vocab,
        "dtype": config.dtype, "gpu": config.gpu, "gpus": config.gpus, "zero": config.zero.stage,
        "activation_checkpointing": config.activation_checkpointing, "memory_bytes": config.memory_bytes,
        "parameters": {"total": count.total, "active": count.active, "by_part": count.by_part},
        "phases": [_phase(config, phase, tokens) for phase, tokens in zip(config.phases, phase_tokens(config))],
    }
    tokens = sum(phase["tokens"] for phase in found["phases"])
    speeds = [phase["speed"] for phase in found["phases"]]
    seconds = None if None in speeds else sum(speed["seconds"] for speed in speeds)
    found |= {
        "total": {
            "tokens": tokens, "steps": config.total_steps, "seconds": seconds, "days": seconds and seconds / DAY,
            "flops": sum(phase["tokens"] * sum(phase["flops_per_token"].values()) for phase in found["phases"]),
        },
        "assumptions": [*MEMORY_ASSUMPTIONS, *(ASSUMPTIONS if seconds else ())],
        "figures": figures(gpu, config) if seconds else {},
    }
    return found


def phase_tokens(config: RunConfig) -> list[int]:
    """How many tokens the run reads in each of its phases."""
    left, done, found = config.total_steps, 0, []
    for phase, following in zip(config.phases, [*config.phases[1:], None]):
        steps = left
        if following is not None:
            steps = min(left, -(-max(0, following.from_tokens - done) // phase.tokens_per_step))
        found.append(steps * phase.tokens_per_step)
        left, done = left - steps, done + found[-1]
    return found


def figures(gpu: Gpu, config: PlanConfig) -> dict[str, dict[str, Any]]:
    """The measured and specified figures that the prediction stands on, each with its source."""
    impl = None if config.model.moe is None else config.model.moe.impl
    named = {
        "products, FLOP/s": gpu.matmul, "memory, bytes/s": gpu.bandwidth, "elementwise, share of it": gpu.elementwise,
    }
    if impl is not None:
        named |= {
            "experts' products, FLOP/s": gpu.grouped, "router's products, FLOP/s": gpu.fp32,
            "between the experts' products, share of the memory's": gpu.routing["torch" if impl == "auto" else impl],
        }
    if config.gpus > 1:
        named["NVLink, bytes/s"] = gpu.nvlink
    if config.gpus > config.gpus_per_node:
        named["network, bytes/s"] = gpu.network
    found = {name: {"value": figure.value, "source": figure.source} for name, figure in named.items()}
    if config.gpus > config.gpus_per_node and config.network_gb is not None:
        found["network, bytes/s"] = {"value": config.network_gb * GB, "source": "network_gb"}
    found["attention, milliseconds"] = {"value": None, "source": ", ".join(dict.fromkeys(m.source for m in ATTENTION))}
    return found


def _phase(config: PlanConfig, phase: Phase, tokens: int) -> dict[str, Any]:
    group = phase.micro_batch * config.gpus
    if phase.global_batch % group:
        raise ValueError(
            f"global_batch={phase.global_batch} is not divisible by micro_batch={phase.micro_batch} times gpus={config.gpus}; "
            f"choose a multiple of {group}, or a smaller micro_batch"
        )
    need = config.model, config.attention, config.tokenizer.vocab_size, phase.seq_len
    own = config.zero.stage, config.activation_checkpointing
    rows = [
        memory(config, phase, stage, mode) | {"speed": speed(config, phase, tokens, stage, mode)}
        for stage in (0, 1, 2, 3) if stage or config.dtype != "bf16"  # stage 0 in bf16 is refused: no fp32 masters
        for mode in KEEP
    ]
    return {
        "seq_len": phase.seq_len, "micro_batch": phase.micro_batch, "global_batch": phase.global_batch,
        "micro_batches": phase.global_batch // group, "tokens": tokens, "flops_per_token": flops_per_token(*need),
        "dense_flops_per_token": sum(dense_flops_per_token(*need).values()), "memory": rows,
        "speed": next(row["speed"] for row in rows if (row["stage"], row["mode"]) == own),
    }


def speed(config: PlanConfig, phase: Phase, tokens: int, stage: int, mode: str) -> dict[str, Any] | None:
    """Predicted: seconds of a step by part, tokens a second, model FLOPs utilisation, and seconds of the phase."""
    if config.dtype != "bf16":
        return None
    gpu = GPUS[config.gpu]
    network = gpu.network.value if config.network_gb is None else config.network_gb * GB
    setup = Setup(
        config.model, config.attention, config.loss, config.tokenizer.vocab_size, phase.seq_len, phase.micro_batch,
        phase.global_batch // (phase.micro_batch * config.gpus), mode, stage, config.gpus, gpu,
        bus_rate(gpu, config.gpus, config.gpus_per_node, network),
    )
    parts = step_seconds(setup)
    step = sum(parts.values())
    rate, peak = phase.tokens_per_step / step, peak_flops(gpu.device)
    flops = sum(flops_per_token(config.model, config.attention, setup.vocab, phase.seq_len).values())
    return {
        "parts": parts, "step_seconds": step, "tokens_per_second": rate, "seconds": tokens / rate,
        "mfu": None if peak is None else mfu(flops, rate, peak, config.gpus),
    }


def memory(config: PlanConfig, phase: Phase, stage: int, mode: str) -> dict[str, Any]:
    """Of a rank, in bytes: states, kept, work, total, the first two by part, too; longest (tokens of a row at micro-batch 1)
    and batch (rows of seq_len), the largest powers of two that fit, 0 for none."""
    vocab, size, model = config.tokenizer.vocab_size, 2 if config.dtype == "bf16" else 4, config.model
    parameters = count_parameters(model, config.attention, vocab).total
    held = states(parameters, stage=stage, ranks=config.gpus, size=size, bucket=config.zero.bucket_size)
    later = growing(parameters, stage=stage, ranks=config.gpus, size=size)
    compiled = config.compile is True or config.compile == "auto" and stage < 3

    def parts(tokens: int, longest: int) -> tuple[dict[str, int], int]:
        need = model, config.attention, vocab, tokens
        kept = activations(
            *need, size=size, mode=mode, longest=longest, compiled=compiled,
            offload=config.activation_offload and mode != "none",
        )
        chunk = loss_chunk(config.loss, vocab, model.hidden_size, tokens)
        work = kept.again + max(workspace(*need, size=size, chunk=chunk).values()) + max(0, later - kept.total)
        return kept.by_part, work

    def total(tokens: int, longest: int) -> int:
        kept, work = parts(tokens, longest)
        return sum(held.values()) + sum(kept.values()) + work

    def largest(tokens_of) -> int:
        found, n = 0, 1
        while n <= 1 << 24 and total(*tokens_of(n)) <= config.memory_bytes:
            found, n = n, 2 * n
        return found

    kept, work = parts(phase.micro_batch * phase.seq_len, phase.seq_len)
    return {
        "stage": stage, "mode": mode, "states": sum(held.values()), "kept": sum(kept.values()), "work": work,
        "total": sum(held.values()) + sum(kept.values()) + work, "states_by_part": held, "kept_by_part": kept,
        "longest": largest(lambda n: (n, n)), "batch": largest(lambda n: (n * phase.seq_len, phase.seq_len)),
    }
