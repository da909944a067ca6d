"""`baseline=RUN`: the gap to another run, live, at equal token counts and only while both have seen the same tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sieve.train.baseline import Baseline, BaselineMismatch
from sieve.train.callbacks.callback import Callback
from sieve.train.rundir import find_run, flatten

if TYPE_CHECKING:
    from sieve.train.state import RunState

log = logging.getLogger(__name__)


def resolve_baseline(value: str, runs_dir: str | Path, own: str | Path) -> Path:
    """The run directory that `baseline=value` names; ValueError when there is none, or it is `own`, the run itself."""
    try:
        directory = find_run(value, Path(runs_dir))
    except ValueError as error:
        raise ValueError(f"baseline={value}: {error}") from error
    if directory.resolve() == Path(own).resolve():
        raise ValueError(f"baseline={value} is this run's own directory; give another name= or another baseline=")
    return directory


class BaselineCallback(Callback):
    """Writes `baseline/*` into each record whose token count the baseline logged too; raises BaselineMismatch when
    the tokens themselves differ, unless `mismatch` is "mark", which then writes `baseline/mismatch` = 1."""

    def __init__(self, directory: Path, *, mismatch: Literal["refuse", "mark"]) -> None:
        self.baseline = Baseline.read(directory)
        self.mismatch = mismatch
        self.matched = self.told = False

    def step(self, run: RunState, record: dict | None) -> None:
        if record is None:
            return
        try:
            found = self.baseline.compare(record, flatten(run.config.model_dump(mode="json")))
        except BaselineMismatch as error:
            if self.mismatch == "refuse":
                raise
            if not self.told:
                log.warning("%s", error)
                self.told = True
            found = self.baseline.metrics(record) | {"baseline/mismatch": 1}
        record.update(found)
        self.matched |= bool(found)
        if not self.matched and not self.told and record["tokens"] >= self.baseline.last_tokens:
            log.warning(
                "baseline %s: no step was logged at the same token count as this run's, so there is no gap to log; "
                "use the same global_batch, seq_len and log.every", self.baseline.run.directory,
            )
            self.told = True
