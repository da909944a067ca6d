"""`sieve twin`: the same model trained twice, first with full attention, then with NSA, and the two compared.

Each run is a `sieve train` of its own, in its own process, named NAME-full and NAME-nsa (NAME is `name=`, else twin).
Stopped by Ctrl-C or SIGTERM, the run at work finishes its step and saves; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from sieve.train.compare import print_comparison, write_comparison
from sieve.train.rundir import RunFiles

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_STOPPED_CODES = (0, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_SHARED_ATTENTION = ("attention.output_gate", "attention.qk_norm")  # what full attention has too


@dataclass(frozen=True)
class Plan:
    """What to run: the overrides of either `sieve train`, the folders, and a word on the choice of preset."""

    on_gpu: bool
    choice: str
    full: tuple[str, ...]
    sparse: tuple[str, ...]
    full_dir: Path
    sparse_dir: Path
    report_dir: Path

    @classmethod
    def of(cls, overrides: Sequence[str], *, variant: str, cuda: bool) -> Plan:
        """Split a user's overrides between the two runs. ValueError for one that the twin itself decides."""
        values = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
        for key in ("attention", "baseline"):
            if key in values:
                raise ValueError(
                    f"{key}={values[key]}: the twin sets {key} itself (attention=full, then attention={variant} with "
                    f"the first as its baseline); override attention.KEY, or train one run with `sieve train`"
                )
        name, runs_dir = values.get("name", "twin"), Path(values.get("runs_dir", "runs"))
        full_dir, sparse_dir = runs_dir / f"{name}-full", runs_dir / f"{name}-{variant}"
        on_gpu = cuda and values.get("device") != "cpu"
        attention = [o for o in overrides if _key(o).startswith("attention.")]
        shared = [o for o in attention if _key(o) in _SHARED_ATTENTION]
        common = [o for o in overrides if o not in attention and _key(o) != "name"]
        if "experiment" in values:
            choice = f"experiment={values['experiment']}, as asked for"
        else:
            preset = "twin-gpu" if on_gpu else "twin-cpu"
            choice = f"experiment={preset}, since {'there is a CUDA GPU' if on_gpu else 'no CUDA GPU is to be used'}"
            common.insert(0, f"experiment={preset}")
        return cls(
            on_gpu=on_gpu, choice=choice, full_dir=full_dir, sparse_dir=sparse_dir,
            report_dir=runs_dir / name / ("" if variant == "nsa" else variant),  # two variants have one full_dir
            full=(*common, *shared, "attention=full", f"name={full_dir.name}"),
            sparse=(*common, *attention, f"attention={variant}", f"name={sparse_dir.name}", f"baseline={full_dir}"),
        )


def _key(override: str) -> str:
    """'+attention.topk=8' -> 'attention.topk'."""
    return override.lstrip("+~").split("=", 1)[0]


class Child:
    """Runs commands one after the other, in their own sessions, so that a Ctrl-C reaches them once, through us.

    A signal is passed on and remembered in `stopped`; the child is waited for, however long its step takes.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.stopped: int | None = None
        self.libc = ctypes.CDLL(None)

    def install(self) -> None:
        """Take over SIGINT and SIGTERM in this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)

    def run(self, command: Sequence[str]) -> int:
        """Run `command` on our stdout and stderr until it ends; its exit code, negative for a signal that killed it.

        Nothing is started once a signal has come; the code is 0 then.
        """
        if self.stopped is not None:
            return 0
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=self._end_with_parent)
        if self.stopped is not None:  # the signal came while the process was being made, and met none
            self.process.send_signal(self.stopped)
        return self.process.wait()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _end_with_parent(self) -> None:
        """In the child: a twin killed outright must not leave a run behind that a second twin would train beside."""
        self.libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def run_twin(plan: Plan, child: Child, terminal: Console, trainer: Sequence[str]) -> int:
    """Both trainings, then the comparison; 0 also after a stop by signal, else the failed run's exit code.

    trainer: the command that takes the overrides of one run.
    """
    for directory, overrides in ((plan.full_dir, plan.full), (plan.sparse_dir, plan.sparse)):
        command = ["sieve", "train", *overrides]
        terminal.rule(f"[bold]{directory.name}")
        terminal.print(" ".join(command), style="dim", markup=False, soft_wrap=True)
        code = child.run([*trainer, *overrides])
        if child.stopped is not None:
            message = f"Stopped in {directory}; the same command goes on from its last checkpoint."
            terminal.print(message, markup=False, soft_wrap=True)
            return 0 if code in _STOPPED_CODES else code
        if code:
            terminal.print(f"{directory.name} failed with exit code {code}; nothing to compare.", markup=False)
            return code if code > 0 else 128 - code
    run, baseline = RunFiles.read(plan.sparse_dir), RunFiles.read(plan.full_dir)
    comparison = write_comparison(run, baseline, [plan.report_dir, plan.sparse_dir / "report"])
    terminal.rule("[bold]comparison")
    print_comparison(run, baseline, comparison, plan.report_dir, terminal)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 after a message for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="sieve twin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides as of `sieve train`")
    parser.add_argument(
        "--variant", choices=("nsa", "window"), default="nsa", help="what to compare with full: in NAME, or in NAME/window"
    )
    parser.add_argument("--cfg", choices=("job",), help="print both runs' configs instead of training")
    options = parser.parse_intermixed_args(argv)
    import torch  # takes seconds, which --help need not wait for

    from sieve.kernels.nsa.api import resolve_impl

    try:
        plan = Plan.of(options.overrides, variant=options.variant, cuda=torch.cuda.is_available())
    except ValueError as error:
        print(f"sieve twin: {error}", file=sys.stderr)
        return 2
    child, trainer = Child(), (sys.executable, "-m", "sieve.train")
    child.install()
    if options.cfg:
        codes = [
            child.run([*trainer, *overrides, "--cfg", options.cfg]) for overrides in (plan.full, plan.sparse)
        ]
        return next((code for code in codes if code), 0)
    terminal = Console(highlight=False)
    terminal.print(plan.choice, markup=False)
    if options.variant == "nsa":
        impl = resolve_impl("auto", torch.device("cuda" if plan.on_gpu else "cpu"), torch.bfloat16)
        terminal.print(f"NSA runs in {'Triton kernels' if impl == 'triton' else 'plain PyTorch'} (attention.impl=auto)")
    return run_twin(plan, child, terminal, trainer)
