"""Checkpoints: how they are found again, which of them are whole, and what may go on from them.

A run keeps them in `checkpoints/step-00000200/`: `rank-00000.safetensors` with each rank's share of weights and optimizer
state (sieve.train.shards), `rank-00000.pt` with its random generators and the experts' load since the last record,
`manifest.json` with everything else that is the same on all ranks, the run's tokenizer (`tokenizer.model`, or `.json`), and
`COMPLETE`, the sha256 of all of those, as `sha256sum -c COMPLETE` checks them. sieve.train.saver writes them under another
name and moves them into place; what begins with `.tmp-` is unfinished or on its way out.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sieve.data.tokenizer import Encoder
from sieve.data.tokenizer_export import saved as saved_tokenizer
from sieve.train.config import RunConfig
from sieve.train.distributed import Place, from_rank_0, gather
from sieve.train.engine import Engine
from sieve.train.partition import persistent_buffers, shapes
from sieve.train.rundir import differences, flatten
from sieve.train.schema import shown
from sieve.train.shards import ShardReader
from sieve.train.state import RunState, set_random_state
from sieve.train.tensorfile import sha256_of

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
FORMAT = 2
TEMPORARY = ".tmp-"
_NAME = re.compile(r"step-(\d{8,})")
_DIGEST = re.compile(r"([0-9a-f]{64})  (\S+)")
# A run goes on only with these settings as they were: with others it would be another run under the same name.
_DECISIVE = (
    "model.", "attention.", "data.", "tokenizer.", "optim.", "schedule.", "loss.z_loss",
    "seq_len", "global_batch", "seed", "dtype",
)
_INDIFFERENT = {
    "data.paths",  # whether the text is the same tells its hash: files may have moved, and a run to another machine
    "model.name", "data.name", "tokenizer.name", "attention.impl", "attention.save_outputs", "model.moe.impl",
    "data.cache_dir", "data.threads", "data.max_broken", "data.workers", "data.prefetch",
    "data.storage_options", "data.retries", "data.timeout", "data.verify",
}


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was completed: where it is, and its manifest. Whether it still is whole, `damage` tells."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def phase(self) -> int:
        """The index of the last step's phase."""
        return self.manifest["data"]["phase"]

    def tokenizer(self) -> Encoder | None:
        """The run's; None where a checkpoint of an earlier version has none. ValueError when it is damaged."""
        about = self.manifest.get("tokenizer")
        return None if about is None else saved_tokenizer(self.path, about)

    @classmethod
    def read(cls, path: Path) -> Saved:
        """ValueError when `path` is no complete checkpoint of this format."""
        if not (path / COMPLETE).is_file():
            old = (path / MANIFEST).is_file()
            raise ValueError(
                f"{path} is no complete checkpoint: it has no file {COMPLETE}"
                + ("; one of format 1, of an earlier version, has none" if old else "")
            )
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            found = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {MANIFEST}: {error}") from error
        if found != FORMAT:
            raise ValueError(f"{path} has checkpoint format {found}; this version reads {FORMAT}")
        return cls(path, manifest)


def checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints of the run in `directory` by their step, ascending: all were complete once."""
    there = (directory / FOLDER).glob("step-*")
    return dict(sorted((int(name[1]), path) for path in there if (name := _NAME.fullmatch(path.name))))


def digests(path: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint, as its COMPLETE lists them. ValueError when that is damaged."""
    try:
        text = (path / COMPLETE).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise ValueError(f"{COMPLETE}: {error}") from error
    found = [_DIGEST.fullmatch(line) for line in text.splitlines()]
    listed = {entry[2]: entry[1] for entry in found if entry}
    if not all(found) or MANIFEST not in listed or not text.endswith("\n"):
        raise ValueError(f"{COMPLETE} is no list of sha256 sums with {MANIFEST} among them")
    return listed


def damage(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, of which this rank reads its share; None: nothing is."""
    try:
        listed = sorted(digests(path).items())
    except ValueError as error:
        return str(error)
    for name, expected in listed[rank::world_size]:
        try:
            found = sha256_of(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            return f"{name} is damaged: its sha256 {found} is not the one in {COMPLETE}"
    return None


def newest(path: Path) -> Saved:
    """`path` itself, a checkpoint, or the newest whole one of the run's folder `path`; read through and compared with its
    checksums. ValueError where there is none; says which it passed over and why."""
    if (path / COMPLETE).is_file():
        problem = damage(path)
        if problem is not None:
            raise ValueError(f"{path} is damaged: {problem}")
        return Saved.read(path)
    there = checkpoints(path)
    for step in sorted(there, reverse=True):
        problem = damage(there[step])
        if problem is None:
            return Saved.read(there[step])
        log.warning("passing over %s: %s", there[step], problem)
    raise ValueError(f"{path} is neither a checkpoint nor a run with a whole one; give runs/NAME or a step's folder in it")


def find(directory: Path, resume: str, place: Place) -> Saved | None:
    """The checkpoint that `resume` (auto, never, a step, or a path) names for the run in `directory`, if there is one;
    its files are read through and compared with their checksums, each rank a share of them.

    auto takes the newest one that is whole, and says which it passed over and why. ValueError when there are some and
    none is whole, and when a step or a path names none or a damaged one. All ranks together; all get the same.
    """
    named = _on_rank_0(lambda: _candidates(directory, resume), place)
    passed = []
    for path in named:
        problem = _problem(path, place)
        if problem is None:
            return _on_rank_0(lambda path=path: Saved.read(path), place)
        if resume != "auto":
            raise ValueError(f"resume={resume}: {path} cannot be resumed from: {problem}")
        log.warning("passing over %s: %s", path, problem)
        passed.append(f"{path.name}: {problem}")
    if passed:
        raise ValueError(
            f"resume=auto: no checkpoint of {directory} is whole ({'; '.join(passed)}); restore one of them, or begin "
            "anew with resume=never, which puts this run's folder aside"
        )
    return None


def _candidates(directory: Path, resume: str) -> list[Path]:
    """Newest first; empty where a run begins."""
    for folder in (directory, directory / FOLDER):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, where the run's folder is to be; move it, or choose another name=")
    there = checkpoints(directory)
    if resume == "never":
        return []
    if resume == "auto":
        return [path for _, path in sorted(there.items(), reverse=True)]
    if resume.isdigit():
        if int(resume) not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise ValueError(f"resume={resume}: {directory} has no checkpoint of that step; it has {steps}")
        return [there[int(resume)]]
    path = Path(resume)
    if not (path / COMPLETE).is_file():
        newest = max(checkpoints(path).items(), default=None)
        hint = f"; did you mean {newest[1]}?" if newest else "; give auto, never, a step, or a checkpoint's folder"
        raise ValueError(f"resume={resume}: is no complete checkpoint{hint}")
    return [path]


def _problem(path: Path, place: Place) -> str | None:
    """Why no run can go on from `path`, as the ranks find together."""
    try:
        _on_rank_0(lambda: Saved.read(path), place)
    except ValueError as error:
        return str(error).removeprefix(f"{path} ")
    return next((problem for problem in gather(damage(path, place.rank, place.world_size)) if problem), None)


def _on_rank_0(work: Callable[[], Any], place: Place) -> Any:
    """What `work` returns on rank 0, on all ranks; a ValueError of it, too, is raised on all."""
    try:
        result = work() if place.rank == 0 else None
    except ValueError as error:
        result = error
    result = from_rank_0(result)
    if isinstance(result, ValueError):
        raise result
    return result


def check_fits(saved: Saved, config: RunConfig, mismatch: Literal["refuse", "allow"] = "refuse") -> None:
    """ValueError, naming what differs, when a run of `config` is another one than `saved` was made by; with "allow" it is
    only said."""
    # Of text that is told by its hash, as training's is, the place does not matter.
    indifferent = _INDIFFERENT | ({"data.validation_paths"} if saved.manifest.get("validation") else set())
    found = {
        key: values
        for key, values in differences(flatten(saved.manifest["config"]), flatten(config.dump())).items()
        if key.startswith(_DECISIVE) and re.sub(r"^data\.sources\.[^.]+", "data", key) not in indifferent
        or key == "init" and values[1] is not None  # it would have no effect
    }
    if not found:
        return
    listed = ", ".join(f"{key}={shown(now)} (was {shown(then)})" for key, (then, now) in found.items())
    if mismatch == "allow":
        log.warning("%s was saved with other settings: %s; going on, as resume_mismatch=allow says", saved.path, listed)
        return
    raise ValueError(
        f"{saved.path} was saved by a run with other settings: {listed}; restore them, or start another run with "
        "name=..., or resume=never; resume_mismatch=allow goes on with the new ones"
    )


def check_validation(saved: Saved, now: dict[str, str], mismatch: Literal["refuse", "allow"] = "refuse") -> None:
    """ValueError when the validation text, by source, is not what losses until `saved` were measured on; as check_fits."""
    changed = sorted(name for name, text in saved.manifest.get("validation", {}).items() if now.get(name, text) != text)
    if not changed:
        return
    of = f" of {', '.join(changed)}" if len(now) > 1 else ""
    told = f"the validation text{of} is not the one that losses until {saved.path} were measured on"
    if mismatch == "allow":
        log.warning("%s; going on, as resume_mismatch=allow says", told)
        return
    raise ValueError(f"{told}; restore it, or start another run; resume_mismatch=allow goes on with the new one")


def restore(saved: Saved, run: RunState, engine: Engine) -> None:
    """Set weights, optimizer, random generators and `run` to where `saved` was made, by however many ranks and at
    whatever ZeRO stage. ValueError when its parameters are not the model's."""
    manifest = saved.manifest
    model = {**shapes(engine.module), **{n: list(b.shape) for n, b in persistent_buffers(engine.module).items()}}
    other = differences(manifest["parameters"], model)
    if other:
        listed = ", ".join(f"{name} {shown(ours)} (the model: {shown(theirs)})" for name, (ours, theirs) in other.items())
        raise ValueError(f"{saved.path} holds another model: {listed}")
    ShardReader(saved.path).fill(engine.pieces(), persistent_buffers(engine.module))
    engine.refresh()
    generators = saved.path / f"rank-{run.rank:05d}.pt"
    if generators.is_file():
        own = torch.load(generators, weights_only=True)
        device = next(engine.module.parameters()).device
        run.load_since = {layer: tokens.to(device) for layer, tokens in own.pop("load_since", {}).items()}
        set_random_state(own)
    else:  # more ranks than there were: generators that nobody else has, the same at every resume
        torch.manual_seed((run.config.seed + 1_000_003 * manifest["step"] + run.rank + 1) % 2**63)
    run.step = run.resumed_from = manifest["step"]
    run.tokens, run.data, run.evaluated_step = manifest["tokens"], manifest["data"], manifest["evaluated_step"]
    run.tokens_before, run.guard = manifest["tokens_before"], manifest["guard"]
    if saved.path.resolve().is_relative_to(run.directory.resolve()):  # else it is another run's, in wandb too
        run.wandb_id = manifest["wandb_id"]


def tidy(directory: Path, start: Saved | None) -> None:
    """Before a run in `directory` begins at `start` (None: anew): remove what killed saves left, and put aside what
    stands in the way. Newer checkpoints become `superseded-step-...`, in place of one of that step that was put aside before;
    a run that is begun anew finds its predecessor's folder renamed to NAME.1, NAME.2, ..."""
    if start is None and checkpoints(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(aside)
        log.info("%s held another run; it is %s now", directory, aside)
        return
    for path in (directory / FOLDER).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)
    for step, path in checkpoints(directory).items():
        if start is not None and (step > start.step or path.parent.resolve() != start.path.parent.resolve()):
            aside = path.with_name(f"superseded-{path.name}")
            discard(aside)
            path.rename(aside)
            log.info("%s does not lead to where this run begins, %s; it is %s now", path, start.path, aside.name)


def discard(path: Path) -> None:
    """Remove a folder so that no part of it is ever taken for whole."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
