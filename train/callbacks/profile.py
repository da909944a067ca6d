"""A few steps under torch.profiler: a trace, a memory snapshot, and where the time of a step goes."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    import torch

    from sieve.train.breakdown import Breakdown
    from sieve.train.state import RunState

log = logging.getLogger(__name__)

FOLDER = "profile"
TRACE, TABLE, MEMORY = "trace.json.gz", "breakdown.json", "memory.pickle"


class ProfileConfig(Config):
    enabled: bool = Field(False, description="profile some steps; profile=true says the same")
    after: int = Field(10, ge=1, description="steps of this process before them: compilation and other warm-up")
    steps: int = Field(3, ge=1, description="steps that are recorded")


class Recorder:
    """Records what `device` and the host do from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._profiler: Any = None

    def start(self, memory: bool = False) -> None:
        """memory: also each allocation on a GPU."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if memory:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            torch.cuda.synchronize(self.device)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def stop(self, folder: Path) -> Breakdown:
        """Write the trace, the memory snapshot if there is one, and the breakdown into `folder`; returns the last."""
        import torch

        from sieve.train.breakdown import breakdown

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profiler.stop()
        folder.mkdir(parents=True, exist_ok=True)
        plain = folder / "trace.json"
        self._profiler.export_chrome_trace(str(plain))
        text = plain.read_bytes()
        plain.unlink()
        with gzip.open(folder / TRACE, "wb", compresslevel=3) as file:
            file.write(text)
        if self.device.type == "cuda" and torch.cuda.memory._snapshot()["device_traces"][self.device.index or 0]:
            torch.cuda.memory._dump_snapshot(str(folder / MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
        found = breakdown(json.loads(text))
        (folder / TABLE).write_text(json.dumps(found.json(), indent=1) + "\n")
        return found


class Profile(Callback):
    """Records `steps` steps, after the first `after` of this process, into `profile/` of the run's folder, on rank 0.

    The steps that are recorded are slower than others, and `perf/*` of their records says so.
    """

    def __init__(self, config: ProfileConfig, device: torch.device) -> None:
        self.config, self.recorder = config, Recorder(device)
        self.first: int | None = None

    def start(self, run: RunState) -> None:
        self.first = None
        if not self.config.enabled or run.rank != 0:
            return
        self.first = run.step + self.config.after
        if self.first + self.config.steps > run.total_steps:
            log.warning(
                "profile.after=%d and profile.steps=%d go beyond the run's last step, %d, from step %d on: nothing is "
                "profiled; give fewer, or more steps", self.config.after, self.config.steps, run.total_steps, run.step,
            )
            self.first = None

    def step(self, run: RunState, record: dict | None) -> None:
        if self.first is None:
            return
        if run.step == self.first:
            self.recorder.start(memory=True)
        elif run.step == self.first + self.config.steps:
            self.first = None
            found = self.recorder.stop(run.directory / FOLDER)
            print(f"profile of steps {run.step - self.config.steps + 1} to {run.step}, in {run.directory / FOLDER}")
            print(found.table(), flush=True)

    def end(self, run: RunState, status: str) -> None:
        if self.first is not None and run.step > self.first:
            self.recorder.stop(run.directory / FOLDER)
