"""`sieve train`: one training run, from its overrides to its last checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sieve.data.disk import writing
from sieve.train.command import describe_keys, is_for_the_user, log_to_stderr, run_command

if TYPE_CHECKING:
    from sieve.train.checkpoint import Saved
    from sieve.train.config import RunConfig
    from sieve.train.distributed import Place
    from sieve.train.lifeline import Lifeline
    from sieve.train.signals import StopSignal

log = logging.getLogger(__name__)

USAGE = """\
usage: sieve train [KEY=VALUE | GROUP=CHOICE ...] [--cfg job] [--help]

Pretrain a decoder. The same command goes on where the run was stopped. Under torchrun, each process is a rank.

  sieve train                                           the defaults: a tiny model with NSA on Python sources
  sieve train attention=full steps=200 name=baseline    GROUP=CHOICE picks a YAML file, KEY=VALUE sets one value
  sieve train attention='[full,nsa]' baseline=baseline  full attention and NSA in turn, compared with another run
  sieve train --cfg job dtype=bf16                      print the whole configuration and end
  sieve train config=mine.yaml name=second              settings of a YAML file, such as that prints
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
    from sieve.train import checkpoint, distributed
    from sieve.train.callbacks.watchdog import end_late, record_nccl
    from sieve.train.lifeline import Lifeline
    from sieve.train.signals import Stopped, StopSignal

    place = distributed.Place.of(config.device)
    log_to_stderr(logging.INFO if place.rank == 0 else logging.ERROR)
    _check_batch(config, place.world_size)
    for text in config.without_effect():
        log.warning("%s", text)
    if place.device.type == "cuda":
        record_nccl(config.directory)
    alone = _only_process(config.directory) if place.rank == 0 else contextlib.nullcontext()
    limit = config.watchdog.stop_seconds
    late = partial(end_late, config.directory, place.rank, limit)
    with StopSignal(limit, late) as stop, alone, distributed.process_group(place), Lifeline(place) as lifeline:
        try:
            with stop.at_once():
                start = checkpoint.find(config.directory, config.resume, place)
                if start is not None:
                    checkpoint.check_fits(start, config, config.resume_mismatch)
                    if _is_complete(start, config):
                        asked = f"of {config.total_steps}"
                        if start.step > config.total_steps:
                            asked = f"is made, and {config.total_steps} are asked for"
                        log.info(
                            "%s is complete: step %d %s; more with steps=, another run with name=, anew with resume=never",
                            config.directory, start.step, asked,
                        )
                        return 0
            return _train(config, place, start, stop)
        except Stopped as signal:
            log.info("ended by %s; no step has been made since the last checkpoint", signal)
            return 0
        except Exception as error:
            return _ended_by(error, lifeline)


def _train(config: RunConfig, place: Place, start: Saved | None, stop: StopSignal) -> int:
    from sieve.train.build import build
    from sieve.train.loop import train

    if place.device.type == "cuda" and config.dtype == "fp32":
        log.info("dtype=fp32 computes without TF32; dtype=bf16 is several times faster and keeps fp32 master weights")
    with stop.at_once(), writing(config.directory):
        training = build(config, place, start, stop)
    steps = training.run.total_steps
    if start is not None:
        log.info("going on from %s: step %d of %d", start.path, start.step, steps)
        _warn_of_a_rise(start, config)
    try:
        with stop.shielded():
            status = train(training.run, training.engine, training.loader, training.callbacks, stop, place)
    finally:
        training.loader.close()
        training.engine.close()
    if status == "stopped":
        log.info("stopped at step %d of %d and saved; the same command goes on from there", training.run.step, steps)
    return 0


def _warn_of_a_rise(start: Saved, config: RunConfig) -> None:
    """Where a run with more steps than before goes back to a learning rate from which it had come down."""
    from sieve.train.config import RunConfig
    from sieve.train.schedule import ratio

    before = RunConfig.of(start.manifest["config"])
    then, now = (ratio(c.schedule, step, c.total_steps) for c, step in ((before, start.step), (config, start.step + 1)))
    if start.step and now > then and ratio(before.schedule, max(start.step - 1, 1), before.total_steps) > then:
        log.warning(
            "the learning rate had come down to %.3g of its peak by step %d of %d, and rises to %.3g again with steps=%d; to "
            "go on from before it fell, give resume=STEP", then, start.step, before.total_steps, now, config.total_steps,
        )


def _is_complete(start: Saved, config: RunConfig) -> bool:
    """Whether nothing is left to do: all steps are made, and the last evaluation was not cut short by a signal."""
    from sieve.train.rundir import METRICS_FILE, read_metrics

    if start.step < config.total_steps:
        return False
    metrics = config.directory / METRICS_FILE
    if not config.eval.every or start.manifest["evaluated_step"] == start.step or not metrics.is_file():
        return True
    rows = read_metrics(metrics)
    return bool(rows) and "eval/loss" in rows[-1]


def _ended_by(error: Exception, lifeline: Lifeline) -> int:
    """Say what ended the run, another rank's error before what follows from it here, and let the other ranks know. Errors
    that are bugs, and a user's mistakes, are raised again."""
    from sieve.data.rows import ReadError
    from sieve.train.callbacks.checkpoint import SaveFailed
    from sieve.train.loop import NonFiniteLoss
    from sieve.train.parity import RanksDisagree

    if isinstance(error, (NonFiniteLoss, RanksDisagree, SaveFailed)):  # on all ranks alike
        if lifeline.place.rank == 0:
            print(f"sieve train: {error}", file=sys.stderr)
        return 1
    if isinstance(error, ValueError) and is_for_the_user(error):
        raise error
    death = lifeline.blame()
    if death is not None:
        print(f"sieve train: {death}; rank {lifeline.place.rank} ends, too", file=sys.stderr)
        return 1
    lifeline.fail(f"{type(error).__name__}: {error}")
    if isinstance(error, ReadError):
        print(f"sieve train: {error}", file=sys.stderr)
        return 1
    raise error


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
