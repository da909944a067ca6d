"""`sieve plan`: parameters, FLOPs and memory of a run before it is started, on paper."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field

from sieve.train.command import describe_keys, run_command
from sieve.train.config import RunConfig

USAGE = """\
usage: sieve plan [gpus=N] [gpu_memory_gb=G] [KEY=VALUE | GROUP=CHOICE ...] [--cfg job] [--help]

Parameters, FLOPs a token and memory a rank of what `sieve train` would do with the same overrides. Nothing is built.
The vocabulary is tokenizer.vocab_size.

  sieve plan model=1b attention=nsa dtype=bf16 seq_len=8192 gpus=8
  sieve plan model=nsa-27b attention=nsa dtype=bf16 gpus=64 seq_len=8192 tokenizer.vocab_size=102400
"""
GB = 1e9


class PlanConfig(RunConfig):
    """What `sieve plan` takes: a run, and the machine it is to run on."""

    gpus: int = Field(1, gt=0, description="ranks the run is to have")
    gpu_memory_gb: float = Field(141.0, gt=0, description="of one GPU, in 1e9 bytes; an H200 has 141, an H100 80")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after a message for a user's mistake."""
    return run_command("sieve plan", sys.argv[1:] if argv is None else argv, load=_load, run=run, help_text=help_text)


def help_text() -> str:
    return describe_keys(USAGE, PlanConfig, "config")


def _load(overrides: list[str]) -> PlanConfig:
    from sieve.train.overrides import load

    return load(PlanConfig, "config", overrides, PlanConfig.of)


def run(config: PlanConfig) -> int:
    """Print the plan of each phase."""
    from sieve.model.count import count_parameters, dense_flops_per_token, flops_per_token

    vocab = config.tokenizer.vocab_size
    count = count_parameters(config.model, config.attention, vocab)
    print(f"parameters: {count.total:,} total, {count.active:,} active")
    print("  " + ", ".join(f"{part} {number:,}" for part, number in count.by_part.items() if number))
    for phase in config.phases:
        need = config.model, config.attention, vocab, phase.seq_len
        flops = flops_per_token(*need)
        print(
            f"\n{phase.seq_len} tokens a row, micro_batch {phase.micro_batch}: {sum(flops.values()) / 1e9:.3f} GFLOPs a token "
            f"({sum(dense_flops_per_token(*need).values()) / 1e9:.3f} with full attention)"
        )
        print("  " + ", ".join(f"{part} {value / 1e9:.3f}" for part, value in flops.items()))
        fits = False
        names = "".join(f" {name:>8}" for name in ("states", "kept", "work", "sum"))
        print(f"  {'GB a rank':10} {'mode':6}{names}  longest row, largest micro-batch")
        for stage in (0, 1, 2, 3):
            if stage == 0 and config.dtype == "bf16":
                continue  # refused: no fp32 masters
            for row in memory(config, stage, phase.seq_len, phase.micro_batch):
                fits = fits or row["total"] <= config.gpu_memory_gb * GB
                figures = "".join(f" {row[name] / GB:8.2f}" for name in ("states", "kept", "work", "total"))
                print(f"  zero={stage:<5} {row['mode']:6}{figures}  {row['longest']:,}, {row['batch']:,}")
        if not fits:
            print(
                f"  warning: none of these fits into gpu_memory_gb={config.gpu_memory_gb:g}; give more gpus with zero=3, a "
                "smaller micro_batch or seq_len"
            )
    print(
        "\nassumptions: Triton's NSA and FlashAttention, one document a row, loss by chunks in PyTorch, no torch.compile; "
        "the CUDA context, fragmentation and NCCL's buffers are left out. No speed is predicted."
    )
    return 0


def memory(config: PlanConfig, stage: int, seq_len: int, micro_batch: int) -> list[dict]:
    """A row for each mode of activation checkpointing, in bytes: states, kept, work, total; longest (tokens of a row at
    micro-batch 1) and batch (rows of seq_len), the largest powers of two that fit, 0 for none."""
    from sieve.model.count import count_parameters
    from sieve.model.loss import chunk_size
    from sieve.model.memory import KEEP, activations, states, workspace

    vocab, size = config.tokenizer.vocab_size, 2 if config.dtype == "bf16" else 4
    parameters = count_parameters(config.model, config.attention, vocab).total
    held = sum(states(parameters, stage=stage, ranks=config.gpus, size=size, bucket=config.zero.bucket_size).values())

    def parts(tokens: int, longest: int, mode: str) -> tuple[int, int]:
        need = config.model, config.attention, vocab, tokens
        kept = activations(*need, size=size, mode=mode, longest=longest)
        again = 0 if mode == "none" else kept.largest_layer
        return kept.total, again + max(workspace(*need, size=size, chunk=chunk_size(config.loss, vocab, "compiled")).values())

    def largest(mode: str, tokens_of) -> int:
        found, n = 0, 1
        while n <= 1 << 24 and held + sum(parts(*tokens_of(n), mode)) <= config.gpu_memory_gb * GB:
            found, n = n, 2 * n
        return found

    rows = []
    for mode in KEEP:
        kept, work = parts(micro_batch * seq_len, seq_len, mode)
        rows.append({
            "mode": mode, "states": held, "kept": kept, "work": work, "total": held + kept + work,
            "longest": largest(mode, lambda n: (n, n)), "batch": largest(mode, lambda n: (n * seq_len, seq_len)),
        })
    return rows
