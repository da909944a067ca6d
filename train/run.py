"""`sieve train`: one training run, from its overrides to its last checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sieve.train.command import describe_keys, log_to_stderr, run_command

if TYPE_CHECKING:
    from sieve.train.checkpoint import Saved
    from sieve.train.config import RunConfig
    from sieve.train.distributed import Place

log = logging.getLogger(__name__)

USAGE = """\
usage: sieve train [KEY=VALUE | GROUP=CHOICE ...] [--cfg job] [--help]

Pretrain a decoder. The same command goes on where the run was stopped. Under torchrun, each process is a rank.

  sieve train                                           the defaults: a tiny model with NSA on Python sources
  sieve train attention=full steps=200 name=baseline    GROUP=CHOICE picks a YAML file, KEY=VALUE sets one value
  sieve train attention='[full,nsa]' baseline=baseline  full attention and NSA in turn, compared with another run
  sieve train --cfg job dtype=bf16                      print the whole configuration and end
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the run is finished or stopped by a signal, 2 for a user's mistake, 1 for a failed run."""
    return run_command(
        "sieve train", sys.argv[1:] if argv is None else argv, load=_load, run=run, help_text=help_text
    )


def _load(overrides: list[str]) -> RunConfig:
    from sieve.train.overrides import load_config

    return load_config(overrides)


def run(config: RunConfig) -> int:
    """Train as `config` says; see `main` for the exit code. ValueError for what this machine or the text rule out."""
    from sieve.train import distributed

    place = distributed.Place.of(config.device)
    log_to_stderr(logging.INFO if place.rank == 0 else logging.ERROR)
    _check_batch(config, place.world_size)
    alone = _only_process(config.directory) if place.rank == 0 else contextlib.nullcontext()
    with alone, distributed.process_group(place):
        start = distributed.from_rank_0(_start(config, place) if place.rank == 0 else None)
        if isinstance(start, ValueError):
            raise start
        if start is not None and start.step >= config.total_steps:
            log.info(
                "%s is complete: step %d of %d; more with steps=, another run with name=, anew with resume=never",
                config.directory, start.step, config.total_steps,
            )
            return 0
        return _train(config, place, start)


def _train(config: RunConfig, place: Place, start: Saved | None) -> int:
    from sieve.data.rows import ReadError
    from sieve.train.build import build
    from sieve.train.loop import NonFiniteLoss, train
    from sieve.train.signals import StopSignal

    if place.device.type == "cuda" and config.dtype == "fp32":
        log.info("dtype=fp32 computes without TF32; dtype=bf16 is several times faster and keeps fp32 master weights")
    training = build(config, place, start)
    steps = training.run.total_steps
    if start is not None:
        log.info("going on from %s: step %d of %d", start.path, start.step, steps)
    try:
        with StopSignal() as stop:
            status = train(training.run, training.engine, training.loader, training.callbacks, stop, place)
    except (NonFiniteLoss, ReadError) as error:
        print(f"sieve train: {error}", file=sys.stderr)
        return 1
    finally:
        training.loader.close()
        training.engine.close()
    if status == "stopped":
        log.info("stopped at step %d of %d and saved; the same command goes on from there", training.run.step, steps)
    return 0


def _start(config: RunConfig, place: Place) -> Saved | ValueError | None:
    """Where to begin, the folder made ready for it; an error is returned, since other ranks wait for an answer."""
    from sieve.train import checkpoint

    try:
        start = checkpoint.find(config.directory, config.resume)
        if start is not None:
            checkpoint.check_fits(start, config, place.world_size)
    except ValueError as error:
        return error
    if start is None or start.step < config.total_steps:
        checkpoint.tidy(config.directory, start)
    return start


def _check_batch(config: RunConfig, world_size: int) -> None:
    for phase in config.phases:
        group = phase.micro_batch * world_size
        if phase.global_batch % group:
            raise ValueError(
                f"global_batch={phase.global_batch} is not divisible by micro_batch={phase.micro_batch} times "
                f"{world_size} processes; choose a multiple of {group}, or a smaller micro_batch"
            )


@contextlib.contextmanager
def _only_process(directory: Path) -> Iterator[None]:
    """Held while a run writes to `directory`: two would mix their files. The system frees it with the process."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = (directory.parent / f".{directory.name}.lock").open("a")
    except OSError as error:
        raise ValueError(f"runs_dir={directory.parent} cannot be written ({error.strerror}); give another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{directory} is in use by another process; wait for it, or give name=...") from error
        yield


def help_text() -> str:
    """Usage, then every group with its choices and every key with its default, as they are at this moment."""
    from sieve.train.config import RunConfig

    return describe_keys(USAGE, RunConfig, "config")
