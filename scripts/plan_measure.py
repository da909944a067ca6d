"""A few real steps of what `sieve plan` plans, on the device that is here, beside what was predicted for it."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch

from sieve.scripts.bench_training import run_case
from sieve.train.gpus import gpu_of
from sieve.train.plan import GB, PLAN_KEYS, PlanConfig, plan

WARMUP, STEPS = 3, 5
SECONDS, LIMIT = 120.0, 1200.0  # of the timed steps, fewer of which are then taken; of a phase with all that is around it
CPU_FLOPS = 2e13  # of a step: minutes on a CPU


def measure_phases(config: PlanConfig, overrides: list[str]) -> dict[str, Any]:
    """For each phase of the run, a rank's own share of a step, in a process of its own; overrides: those of `config`.

    "predicted" is `plan` for one GPU of the kind that is here, None where there are no figures for it. A phase that could
    not be measured has "error". ValueError where no GPU is and a CPU would take hours or has not the memory.
    """
    cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    if cuda and not torch.cuda.is_available():
        raise ValueError("--measure with device=cuda, and torch sees no GPU; choose device=auto or cpu")
    device = torch.cuda.get_device_name() if cuda else "cpu"
    alone = config.model_copy(update={"gpus": 1, "gpu": gpu_of(device) or config.gpu})
    found: dict[str, Any] = {"device": device, "phases": []}
    for index, phase in enumerate(config.phases):
        rows = phase.global_batch // config.gpus
        own = alone.model_copy(update={
            "seq_len": phase.seq_len, "global_batch": rows, "micro_batch": phase.micro_batch,
            "data": config.data.model_copy(update={"phases": ()}), "steps": 1, "tokens": None,
        })
        predicted = plan(own)["phases"][0]
        needed = next(
            row["total"] for row in predicted["memory"]
            if (row["stage"], row["mode"]) == (config.zero.stage, config.activation_checkpointing)
        )
        if not cuda:
            _check_cpu(config, sum(predicted["flops_per_token"].values()) * rows * phase.seq_len, needed)
        settings = [
            *(text for text in overrides if text.lstrip("+~").split("=")[0] not in PLAN_KEYS | {"tokens", "steps"}),
            "tokens=null", "steps=1000000", f"seq_len={phase.seq_len}", f"global_batch={rows}",
            f"micro_batch={phase.micro_batch}", *(["data.phases=[]"] if len(config.phases) > 1 else []),
        ]
        print(
            f"measuring on {device}: {WARMUP} steps to warm up, then {STEPS} of {rows} rows of {phase.seq_len} tokens",
            file=sys.stderr, flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            result = run_case({
                "what": "measure", "overrides": settings, "vocab": config.tokenizer.vocab_size, "documents": 1,
                "warmup": WARMUP, "steps": STEPS, "seconds": SECONDS, "profile": folder if cuda else None,
            }, LIMIT)
        if "out_of_memory" in result:
            result = {"error": f"out of memory, where {needed / GB:.1f} GB were predicted: {result['out_of_memory']}"}
        known = cuda and gpu_of(device) is not None and predicted["speed"] is not None
        found["phases"].append(result | {
            "phase": index, "settings": settings, "cuda": cuda,
            "predicted": {"peak_bytes": needed} | (predicted["speed"] if known else {}),
        })
    return found


def _check_cpu(config: PlanConfig, flops: float, needed: float) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if flops > CPU_FLOPS or needed > there:
        raise ValueError(
            f"--measure on a CPU: a step of model={config.model.name} is {flops:.2g} FLOPs (here at most "
            f"{CPU_FLOPS:.2g}) and {needed / GB:.1f} GB ({there / GB:.1f} GB are free); measure where a GPU is, or take "
            "model=tiny, or a smaller seq_len, global_batch or micro_batch"
        )


def measured_lines(found: dict[str, Any]) -> list[str]:
    """Measured beside predicted, to be read."""
    text = []
    for phase in found["phases"]:
        name = f"phase {phase['phase']}, " if len(found["phases"]) > 1 else ""
        text.append(f"{name}one rank's share of a step, alone on {found['device']}:")
        if "error" in phase:
            text.append(f"  not measured: {phase['error']}")
            continue
        predicted = phase["predicted"]
        text.append(f"  {'':34}{'predicted':>12}{'measured':>12}")
        for key, scale in (("step_seconds", 1.0), ("tokens_per_second", 1.0), ("mfu", 1.0), ("peak_bytes", GB)):
            label = {"peak_bytes": "peak memory, GB"}.get(key, key.replace("_", " "))
            text.append(f"  {label:34}" + "".join(_cell(side.get(key), scale) for side in (predicted, phase)))
        parts = (phase.get("breakdown") or {}).get("parts", {})
        if parts:
            text.append("  milliseconds of a step (measured under a profiler, which slows the host)")
            ours = predicted.get("parts", {})
            for part in {**parts, **ours}:
                text.append(f"  {part:34}" + "".join(_cell(side.get(part), 1e-3) for side in (ours, parts)))
        if not phase["cuda"]:
            text.append(
                "  no speed is predicted for a CPU; its peak is all of the process with its libraries, the predicted one is of "
                "the operators that run on CUDA"
            )
        elif "parts" not in predicted:
            text.append(f"  no speed is predicted: there are no figures for {found['device']}, or for dtype=fp32")
    return text


def _cell(value: float | None, scale: float) -> str:
    if value is None:
        return f"{'-':>12}"
    value /= scale
    return f"{value:12,.0f}" if value >= 1e4 else f"{value:12.4g}"
