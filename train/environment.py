"""environment.json: what produced a run, as far as this process can tell."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sieve.model.count import count_parameters, dense_flops_per_token, flops_per_token
from sieve.train.config import RunConfig
from sieve.train.distributed import Place

_PACKAGES = (
    "sieve-lm", "torch", "triton", "deepspeed", "liger-kernel", "numpy", "sentencepiece", "pydantic", "hydra-core",
    "wandb",
)
_MAX_DIFF = 1_000_000  # characters


def environment(config: RunConfig, place: Place, vocab_size: int) -> dict[str, Any]:
    """JSON-able: command, versions, hardware, git commit and uncommitted changes; the model's parameters, and its
    training FLOPs per token (by part, and as one number with full attention instead)."""
    model, attention, seq_len = config.model, config.attention, config.phases[0].seq_len
    count = count_parameters(model, attention, vocab_size)
    gpu = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        # torch's package may leave out which build it is (2.13.0 of 2.13.0+cu130).
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None}
        | {"torch": str(torch.__version__)},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": place.device.type,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "world_size": place.world_size,
        "git": git_state(Path(__file__).resolve().parent),
        "vocab_size": vocab_size,
        "parameters": {"total": count.total, "active": count.active, "by_part": count.by_part},
        "flops_per_token": flops_per_token(model, attention, vocab_size, seq_len),
        "dense_flops_per_token": sum(dense_flops_per_token(model, attention, vocab_size, seq_len).values()),
    }


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit and uncommitted changes of the checkout that `folder` lies in; None if it lies in none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git(folder, "diff", "HEAD") or ""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml") or ""
    return {"commit": commit.strip(), "diff": diff[:_MAX_DIFF], "untracked": untracked.strip()}


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's answer, or None without git, without a checkout or without a commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
