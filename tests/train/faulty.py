"""`sieve train` with a fault built in: FAULTS, a JSON list of {"at": PLACE, "do": WHAT, "rank": R, "step": N, "arg": ...}.

at: build (while the text is read), step (in training step N, before the update), validation (in the first evaluation),
    save (in the thread that writes step N's files, when some are written), commit (between the files and the rename).
do: a signal's name, sent to this process (to the whole process group with "arg": "group"); hang; raise; nan (in the loss,
    or with "arg": "gradient" in the gradients alone); perturb (a weight, a little); wait (for "arg" seconds).
rank: which rank, all of them without. Every fault happens once in a process; with "once": FILE, once for good.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sieve.train import build, loop, saver
from sieve.train.engine import Engine
from sieve.train.run import main

RANK = int(os.environ.get("RANK", 0))
FAULTS = [fault for fault in json.loads(os.environ.get("FAULTS", "[]")) if fault.get("rank", RANK) == RANK]


def due(place: str, step: int | None = None) -> list[dict[str, Any]]:
    found = [f for f in FAULTS if f["at"] == place and f.get("step", step) == step]
    for fault in found:
        FAULTS.remove(fault)
    return [f for f in found if "once" not in f or _first(Path(f["once"]))]


def _first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def happen(place: str, step: int | None = None) -> list[dict[str, Any]]:
    """Let what is due happen; what the caller has to do itself is returned."""
    left = []
    for fault in due(place, step):
        do, arg = fault["do"], fault.get("arg")
        print(f"fault: {do} at {place}", file=sys.stderr, flush=True)
        if do.startswith("SIG"):
            number = signal.Signals[do]
            os.killpg(0, number) if arg == "group" else os.kill(os.getpid(), number)
        elif do == "hang":
            time.sleep(10_000)
        elif do == "raise":
            raise RuntimeError(arg or "a fault of the test")
        elif do == "wait":
            time.sleep(arg)
        else:
            left.append(fault)
    return left


def wrap(owner: Any, name: str, around: Callable) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def train_step(original: Callable, run: Any, engine: Any, *rest: Any) -> Any:
    for fault in happen("step", run.step + 1):
        if fault["do"] == "perturb":
            engine.module.norm.weight.data[3] += 1e-5
        else:
            poison(engine, "backward" if fault.get("arg") == "gradient" else "forward")
    return original(run, engine, *rest)


def poison(engine: Any, name: str) -> None:
    """The next call of the engine's forward gives a loss that is no number, or its next backward gets one."""
    method = getattr(engine, name)

    def once(*args: Any, **kwargs: Any) -> Any:
        delattr(engine, name)
        if name == "backward":
            return method(args[0] * float("nan"))
        out = method(*args, **kwargs)
        return out._replace(loss_sum=out.loss_sum * float("nan"), ce_sum=out.ce_sum * float("nan"))

    setattr(engine, name, once)


def in_validation(original: Callable, self: Any, batch: Any) -> Any:
    happen("validation")
    return original(self, batch)


def in_save(original: Callable, path: Path, data: bytes) -> Any:
    """Called for a rank's generators, when its tensors are written, and for the manifest and COMPLETE."""
    step = int(path.parent.name.rpartition("-")[2])
    happen("save" if path.suffix == ".pt" else "commit", step)
    return original(path, data)


def in_build(original: Callable, *args: Any) -> Any:
    happen("build")
    return original(*args)


wrap(loop, "train_step", train_step)
wrap(build, "build_corpus", in_build)
wrap(saver, "write_bytes", in_save)
_evaluate = Engine.evaluate
Engine.evaluate = lambda self, batch: in_validation(_evaluate, self, batch)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
