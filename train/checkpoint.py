"""Checkpoints that are whole or absent: written under another name, synced, and moved into place.

A run keeps them in `checkpoints/step-00000200/`: DeepSpeed's files, `rank-00000.pt` with each rank's random generators,
and `manifest.json`, written last, with everything that is the same on all ranks. What begins with `.tmp-` is unfinished
or on its way out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sieve.train.config import RunConfig
from sieve.train.distributed import barrier
from sieve.train.engine import Engine
from sieve.train.rundir import differences, flatten
from sieve.train.schema import shown
from sieve.train.state import RunState, random_state, set_random_state

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"step-(\d{8,})")
# A run goes on only with these settings as they were: with others it would be another run under the same name.
_DECISIVE = (
    "model.", "attention.", "data.", "tokenizer.", "optim.", "schedule.", "loss.z_loss",
    "seq_len", "global_batch", "seed", "dtype", "zero.stage",
)
_INDIFFERENT = {
    "model.name", "data.name", "tokenizer.name", "attention.impl", "attention.save_outputs",
    "data.cache_dir", "data.threads", "data.max_broken", "data.workers", "data.prefetch",
    "data.storage_options", "data.retries", "data.timeout", "data.verify",
}


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: where it is, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def phase(self) -> int:
        """The index of the last step's phase."""
        return self.manifest["data"]["phase"]

    @classmethod
    def read(cls, path: Path) -> Saved:
        """ValueError when `path` is no complete checkpoint of this format."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no complete checkpoint: {MANIFEST}: {error}") from error
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path} has checkpoint format {manifest.get('format')}; this version reads {FORMAT}")
        return cls(path, manifest)


def checkpoints(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of the run in `directory` by their step, ascending."""
    found = {}
    for path in (directory / FOLDER).glob("step-*"):
        name = _NAME.fullmatch(path.name)
        if name and (path / MANIFEST).is_file():
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def find(directory: Path, resume: str) -> Saved | None:
    """The checkpoint that `resume` (auto, never, a step, or a path) names for the run in `directory`, if there is one.

    ValueError when a step or a path names none.
    """
    there = checkpoints(directory)
    if resume == "never" or resume == "auto" and not there:
        return None
    if resume == "auto":
        return Saved.read(there[max(there)])
    if resume.isdigit():
        if int(resume) not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise ValueError(f"resume={resume}: {directory} has no checkpoint of that step; it has {steps}")
        return Saved.read(there[int(resume)])
    path = Path(resume)
    if not (path / MANIFEST).is_file():
        newest = max(checkpoints(path).items(), default=None)
        hint = f"; did you mean {newest[1]}?" if newest else "; give auto, never, a step, or a checkpoint's folder"
        raise ValueError(f"resume={resume}: is no complete checkpoint{hint}")
    return Saved.read(path)


def check_fits(saved: Saved, config: RunConfig, world_size: int) -> None:
    """ValueError, naming what differs, when a run of `config` cannot go on from `saved`."""
    found = {
        key: values
        for key, values in differences(flatten(saved.manifest["config"]), flatten(config.dump())).items()
        if key.startswith(_DECISIVE) and re.sub(r"^data\.sources\.[^.]+", "data", key) not in _INDIFFERENT
    }
    if found:
        listed = ", ".join(f"{key}={shown(now)} (was {shown(then)})" for key, (then, now) in found.items())
        raise ValueError(
            f"{saved.path} was saved by a run with other settings: {listed}; restore them, or start another run with "
            "name=..., or resume=never"
        )
    if saved.manifest["world_size"] != world_size:
        raise ValueError(
            f"{saved.path} was saved by {saved.manifest['world_size']} processes and can only be loaded by as many; "
            f"now there are {world_size}"
        )


def save(run: RunState, engine: Engine, keep: int) -> Path:
    """Write the checkpoint of `run` as it is now; all ranks together. The newest `keep` stay. Returns its path."""
    final = run.directory / FOLDER / f"step-{run.step:08d}"
    partial = final.with_name(f"{_TEMPORARY}{final.name}")
    if run.rank == 0:
        partial.mkdir(parents=True, exist_ok=True)
    barrier()
    engine.save(partial)
    torch.save(random_state(), partial / f"rank-{run.rank:05d}.pt")
    for path in partial.glob("*"):  # every rank syncs what is there: its own files at least
        _sync(path)
    barrier()
    if run.rank == 0:
        manifest = {
            "format": FORMAT, "step": run.step, "tokens": run.tokens, "evaluated_step": run.evaluated_step,
            "world_size": run.world_size, "wandb_id": run.wandb_id, "data": run.data, "config": run.config.dump(),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        _discard(final)
        partial.rename(final)
        _sync(final.parent)
        for path in list(checkpoints(run.directory).values())[:-keep]:
            _discard(path)
    barrier()
    return final


def restore(saved: Saved, run: RunState, engine: Engine) -> None:
    """Set weights, optimizer, random generators and `run` to where `saved` was made."""
    manifest = saved.manifest
    engine.load(saved.path)
    set_random_state(torch.load(saved.path / f"rank-{run.rank:05d}.pt", weights_only=True))
    run.step = run.resumed_from = manifest["step"]
    run.tokens, run.data, run.evaluated_step = manifest["tokens"], manifest["data"], manifest["evaluated_step"]
    if saved.path.resolve().is_relative_to(run.directory.resolve()):  # else it is another run's, in wandb too
        run.wandb_id = manifest["wandb_id"]


def tidy(directory: Path, start: Saved | None) -> None:
    """Before a run in `directory` begins at `start` (None: anew): remove what killed saves left, and put aside what
    stands in the way. Nothing complete is deleted: newer checkpoints become `superseded-step-...`, and a run that is
    begun anew finds its predecessor's folder renamed to NAME.1, NAME.2, ..."""
    if start is None and checkpoints(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(aside)
        log.info("%s held another run; it is %s now", directory, aside)
        return
    for path in (directory / FOLDER).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)
    for step, path in checkpoints(directory).items():
        if start is not None and (step > start.step or path.parent.resolve() != start.path.parent.resolve()):
            aside = path.with_name(f"superseded-{path.name}")
            _discard(aside)
            path.rename(aside)
            log.info("%s does not lead to where this run begins, %s; it is %s now", path, start.path, aside.name)


def _discard(path: Path) -> None:
    """Remove a folder so that no part of it is ever taken for whole."""
    if path.exists():
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
