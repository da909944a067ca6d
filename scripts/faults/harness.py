"""Trainings in processes of their own, with the faults of tests/train/faulty.py, and what is asked of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from sieve.train.checkpoint import checkpoints, damage

ROOT = Path(__file__).resolve().parents[2]
FAULTY = ROOT / "tests" / "train" / "faulty.py"


class Skipped(Exception):
    """A check that this machine cannot make; says why."""


class Failed(Exception):
    """A check whose outcome is not the expected one; says what was found."""


def expect(condition: object, found: str) -> None:
    if not condition:
        raise Failed(found)


class Process:
    """A training under way; lines: what it has said, each with the second at which it came."""

    def __init__(self, command: list[str], faults: list[dict], times: Path) -> None:
        environment = os.environ | {
            "FAULTS": json.dumps(faults), "TIMES": str(times), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        }
        self.lines: list[tuple[float, str]] = []
        self.child = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.child.stderr:
            self.lines.append((time.monotonic(), line))

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def when(self, part: str) -> float:
        """The second at which the first line with `part` came."""
        found = [at for at, line in self.lines if part in line]
        expect(found, f"nothing is said of '{part}': {self.text[-600:]}")
        return found[0]

    def wait(self, seconds: float) -> int:
        try:
            code = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise Failed(f"no end within {seconds:.0f} s: {self.text[-600:]}") from None
        self._reader.join(5)
        return code

    def end(self) -> None:
        """At once, with its ranks, which are sessions of their own under torchrun."""
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children")
        pids = children.read_text().split() if children.exists() else []
        for pid in (self.child.pid, *map(int, pids)):
            try:
                os.killpg(os.getpgid(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.child.wait()


class Runs:
    """Starts trainings in one folder. settings: overrides of all."""

    def __init__(self, folder: Path, settings: list[str], limit: float) -> None:
        self.folder, self.settings, self.limit = folder, settings, limit
        self._started: list[Process] = []

    def but(self, settings: list[str]) -> Runs:
        """The same with other settings for all."""
        other = Runs(self.folder, settings, self.limit)
        other._started = self._started
        return other

    def end_all(self) -> None:
        """Whatever is still running."""
        for process in self._started:
            if process.child.poll() is None:
                process.end()

    def start(self, name: str, *settings: str, ranks: int = 1, restarts: int = 0, faults: list[dict] | None = None) -> Process:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                         f"--max-restarts={restarts}"]
        command = [*launcher, str(FAULTY), *self.settings, *settings, f"name={name}"]
        process = Process(command, faults or [], self.folder / f"{name}.times")
        self._started.append(process)
        return process

    def run(self, name: str, *settings: str, **options: object) -> Process:
        """One that has to end well."""
        process = self.start(name, *settings, **options)
        code = process.wait(self.limit)
        expect(code == 0, f"{name}: exit code {code}: {process.text[-1200:]}")
        return process

    def rows(self, name: str) -> list[dict]:
        path = self.folder / name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]

    def await_step(self, name: str, step: int, process: Process) -> None:
        until = time.monotonic() + self.limit
        while process.child.poll() is None and len(self.rows(name)) < step:
            if time.monotonic() > until:
                process.end()
                raise Failed(f"{name} has not made step {step} within {self.limit:.0f} s: {process.text[-600:]}")
            time.sleep(0.005)

    def expect_whole(self, name: str) -> int:
        """The newest checkpoint's step, after a look at all files of all of them."""
        found = checkpoints(self.folder / name)
        for path in found.values():
            problem = damage(path)
            expect(problem is None, f"{path.name}: {problem}")
        return max(found, default=0)

    def expect_same(self, name: str, other: str) -> str:
        ours, theirs = self.rows(name), self.rows(other)
        for a, b in zip(ours, theirs):
            expect(a == b, f"step {a['step']} differs: loss {a.get('train/loss')!r}, undisturbed {b.get('train/loss')!r}")
        expect(len(ours) == len(theirs), f"{len(ours)} steps instead of {len(theirs)}")
        return f"{len(ours)} losses, norms and hashes bit-equal to an undisturbed run"
