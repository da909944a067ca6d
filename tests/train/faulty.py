"""`sieve train` with a fault built in: FAULTS, a JSON list of {"at": PLACE, "do": WHAT, "rank": R, "step": N, "arg": ...}.

at: build (while the text is read), step (in training step N, before the update), validation (in the first evaluation),
    save (in the thread that writes step N's files, when some are written), commit (between the files and the rename).
do: a signal's name, sent to this process (to the whole process group with "arg": "group"); hang (with "arg": "in C" there);
    raise; nan (in the loss, or with "arg": "gradient" in the gradients alone; with "compare": true it tells how much of the
    state the step has changed, as compare does of a good step); perturb (a weight, a little); wait (for "arg" seconds);
    an errno's name, as ENOSPC (raised where a file is written: at save or commit).
rank: which rank, all of them without. Every fault happens once in a process; with "once": FILE, once for good.

TIMES: a file that gets a line of JSON for each step's begin, {"step", "at"}, and each save's end, {"saved", "stall", ...}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
        elif do == "hang" and arg == "in C":  # where no handler of Python's runs
            mutex = ctypes.create_string_buffer(64)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
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
    note(step=run.step + 1, at=time.perf_counter())
    compared = False
    for fault in happen("step", run.step + 1):
        compared |= fault.get("compare", False) or fault["do"] == "compare"
        if fault["do"] == "perturb":
            engine.module.norm.weight.data[3] += 1e-5
        elif fault["do"] == "nan":
            poison(engine, "backward" if fault.get("arg") == "gradient" else "forward")
    before = state_of(engine) if compared else None
    record = original(run, engine, *rest)
    if before is not None:
        after = state_of(engine)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        told = f"changed {len(changed)} of {len(before)} tensors, fused={engine._adamw.defaults['fused']}: {changed[:3]}"
        print(f"fault: step {run.step} has {told}", file=sys.stderr, flush=True)
    return record


def state_of(engine: Any) -> dict[str, Any]:
    """Copies of weights, moments and the optimizer's counts, and of the model's buffers."""
    found = {f"{p.name}:{kind}": t for p in engine.pieces() for kind, t in {**p.tensors, "step": p.step}.items()}
    # ZeRO-3 keeps a parameter's own part in ds_tensor; the parameter is empty or whole, as it is used.
    found |= {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}
    found |= dict(engine.module.named_buffers())
    return {name: t.detach().clone() for name, t in found.items()}


def note(**entry: Any) -> None:
    if "TIMES" in os.environ and RANK == 0:
        with open(os.environ["TIMES"], "a") as file:
            file.write(json.dumps(entry) + "\n")


def in_outcome(original: Callable, self: Any, *args: Any) -> Any:
    done = original(self, *args)
    note(saved=done.step, stall=done.stall, seconds=done.seconds, size=done.size, problem=done.problem)
    return done


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
    for fault in happen("save" if path.suffix == ".pt" else "commit", step):
        raise OSError(getattr(errno, fault["do"]), os.strerror(getattr(errno, fault["do"])))
    return original(path, data)


def in_build(original: Callable, *args: Any) -> Any:
    happen("build")
    return original(*args)


wrap(loop, "train_step", train_step)
wrap(build, "build_corpus", in_build)
wrap(saver, "write_bytes", in_save)
_evaluate, _outcome = Engine.evaluate, saver.Saver._outcome
saver.Saver._outcome = lambda self, *args: in_outcome(_outcome, self, *args)
Engine.evaluate = lambda self, batch: in_validation(_evaluate, self, batch)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
