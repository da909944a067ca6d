"""What callbacks see of a run, without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel


class Settings(BaseModel):
    """A stand-in for RunConfig."""

    seed: int = 0
    seq_len: int = 100


@pytest.fixture
def make_state(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """make_state(**changes): the attributes that callbacks read of a RunState, in runs/run."""

    def make(**changes: object) -> SimpleNamespace:
        directory = tmp_path / "runs" / "run"
        directory.mkdir(parents=True, exist_ok=True)
        state = dict(
            config=Settings(), directory=directory, step=0, tokens=0, total_steps=20, rank=0, world_size=1,
            resumed_from=None, wandb_id=None, phase=0, health={}, expert_load={}, router_bias={},
        )
        return SimpleNamespace(**(state | changes))

    return make
