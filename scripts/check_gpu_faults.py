"""What a run survives, on this machine's GPUs: kills, signals, NaN, hung and lost ranks, and what a save costs.

    python scripts/check_gpu_faults.py [--budget SECONDS] [--only NAME,...] [KEY=VALUE ...]

Trains a small model on made-up text (or on what the overrides name, as in `data=books tokenizer=bpe4k`) in processes of
their own, with the faults of tests/train/faulty.py, and prints a table last; exit code 1 when a check fails. On a machine
without GPUs the same runs on the CPU at toy size, and what needs a GPU is told as skipped.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sieve.scripts.faults.harness import Failed, Runs, Skipped, expect

GPUS = torch.cuda.device_count()
CUDA = GPUS > 0
# Two undisturbed runs on a GPU are bit-equal only with our own kernels: FlashAttention's gradients differ from run to run.
REPEATABLE = ["attention=nsa", "attention.impl=triton"]
TOY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.head_dim_qk=8", "model.head_dim_v=8",
    "model.intermediate_size=48", "model.moe.num_experts=4", "model.moe.expert_size=16", "attention.kernel_size=8",
    "attention.kernel_stride=4", "attention.block_size=8", "attention.topk=4", "attention.window_size=16", "seq_len=64",
]


def kills(runs: Runs, attention: str, count: int = 2) -> str:
    """kill -9 at random moments of a bf16 run that saves every 2 steps; resumed each time."""
    name, steps = f"killed-{attention}", 80 if CUDA else 30
    kernels = [] if not CUDA else ["attention.impl=triton"] if attention == "nsa" else ["attention.dense_impl=triton"]
    common = [f"attention={attention}", *kernels, "dtype=bf16", f"steps={steps}", "checkpoint.every=2"]
    whole, generator = f"whole-{attention}", random.Random(len(attention))
    runs.run(whole, *common)
    at = []
    for number in range(count):
        process = runs.start(name, *common)
        step = (number + 1) * steps // (count + 2)
        runs.await_step(name, step, process)
        time.sleep(generator.uniform(0, 0.3))
        expect(process.child.poll() is None, f"the run ended before it was killed: {process.text[-600:]}")
        process.end()
        done = len(runs.rows(name))
        for ours, theirs in zip(runs.rows(name), runs.rows(whole)):
            expect(ours == theirs, f"step {ours['step']} differs from the undisturbed run's already before kill {number + 1}")
        at.append(f"{done}, saved {runs.expect_whole(name)}")
    runs.run(name, *common)
    runs.expect_whole(name)
    return f"killed after steps {'; '.join(at)}: {runs.expect_same(name, whole)}"


def no_number(runs: Runs, zero: int, dtype: str) -> str:
    """NaN in a loss and in the gradients: the steps change nothing, a good one does."""
    name = f"nan-{zero}-{dtype}"
    process = runs.run(name, "attention=window", f"zero={zero}", f"dtype={dtype}", "steps=8", faults=[
        {"at": "step", "step": 3, "do": "nan", "compare": True},
        {"at": "step", "step": 5, "do": "nan", "arg": "gradient", "compare": True},
        {"at": "step", "step": 6, "do": "compare"},
    ])
    told = {int(line.split()[2]): line.split()[5:8] for _, line in process.lines if "has changed" in line}
    expect(set(told) == {3, 5, 6}, f"told of steps {sorted(told)}: {process.text[-600:]}")
    expect(told[3][0] == told[5][0] == "0", f"skipped steps have changed {told[3][0]} and {told[5][0]} tensors")
    expect(told[6][0] != "0", "a good step has changed nothing")
    expect(f"fused={CUDA}" in process.text, f"AdamW is not fused={CUDA}")
    skipped = [row["train/skipped"] for row in runs.rows(name)]
    expect(skipped == [0, 0, 1, 1, 2, 2, 2, 2], f"train/skipped is {skipped}")
    return f"0 of {told[3][2]} tensors changed by both, {told[6][0]} by a good step; AdamW fused={CUDA}"


def sigterm(runs: Runs, workers: int) -> str:
    """SIGTERM while threads read ahead: exit 0, the last step is saved."""
    name = f"sigterm-{workers}"
    process = runs.start(name, "attention=window", "dtype=bf16", f"data.workers={workers}", "steps=2000",
                         "checkpoint.every=500")
    runs.await_step(name, 3, process)
    begin = time.monotonic()
    process.child.send_signal(signal.SIGTERM)
    code = process.wait(60)
    took, made = time.monotonic() - begin, len(runs.rows(name))
    expect(code == 0, f"exit code {code}: {process.text[-600:]}")
    expect(runs.expect_whole(name) == made < 2000, f"{made} steps made, saved at {runs.expect_whole(name)}")
    return f"exit 0 after {took:.1f} s, step {made} saved"


def elastic(runs: Runs, zero: int) -> str:
    """1 -> 2 -> 1 ranks in fp32, beside a run of one rank; a dense model, so that rounding moves no token elsewhere."""
    if CUDA and GPUS < 2:
        raise Skipped("needs 2 GPUs: NCCL puts one rank on each")
    common = ["attention=window", "model.moe=null", "dtype=fp32", f"zero={zero}", "micro_batch=1", "steps=40", "eval=none",
              "checkpoint.every=10", "checkpoint.keep=9"]
    runs = runs.but([s for s in runs.settings if not s.startswith("model.moe.")])
    names = [f"{kind}-{zero}" for kind in ("one", "two", "one-again")]
    runs.run(names[0], *common)
    for name, source, step, ranks in ((names[1], names[0], 10, 2), (names[2], names[1], 20, 1)):
        runs.run(name, *common, f"resume={runs.folder}/{source}/checkpoints/step-{step:08d}", ranks=ranks)
    expected = {row["step"]: row["train/loss"] for row in runs.rows(names[0])}
    worst = {}
    for name, first in ((names[1], 11), (names[2], 21)):
        rows = runs.rows(name)
        expect([row["step"] for row in rows] == list(range(first, 41)), f"{name} has not steps {first} to 40")
        worst[name] = max(abs(row["train/loss"] / expected[row["step"]] - 1) for row in rows[:20])
        expect(worst[name] < 1e-5, f"{name}: a loss is off by {worst[name]:.1e} within 20 steps")
    return ", ".join(f"{name}: {value:.1e}" for name, value in worst.items()) + " at most, relative, over 20 steps"


def hung(runs: Runs) -> str:
    """The last rank hangs: every rank's stacks and NCCL's flight recorder in the run's folder, and the end."""
    ranks, seconds = (min(GPUS, 2) or 2), 40 if CUDA else 8
    process = runs.start("hung", "attention=window", "dtype=bf16", "micro_batch=1", "steps=2000", f"watchdog.seconds={seconds}",
                         ranks=ranks, faults=[{"at": "step", "step": 6, "rank": ranks - 1, "do": "hang"}])
    code = process.wait(runs.limit)
    took = time.monotonic() - process.when("fault: hang")
    stacks = runs.folder / "hung" / "stacks"
    texts = [(stacks / f"rank-{rank:05d}.txt").read_text() for rank in range(ranks)]
    expect(code != 0 and "watchdog.seconds" in process.text, f"exit code {code}: {process.text[-600:]}")
    expect("in happen" in texts[-1] and all("File" in text for text in texts), "the stacks do not show where it hangs")
    found = f"{ranks} ranks' stacks"
    if CUDA:
        traces = [pickle.loads((stacks / f"rank-{rank:05d}.nccl").read_bytes()) for rank in range(ranks)]
        entries = [len(trace.get("entries", [])) for trace in traces]
        expect(ranks == 1 or all(entries), f"NCCL's flight recorder has {entries} collectives")
        found += f", flight recorders of {entries} collectives"
    return f"{found}; ended with code {code} {took:.0f} s after the hang"


def lost(runs: Runs) -> str:
    """A rank is killed: the other ends within seconds, torchrun starts both again, and they go on."""
    if CUDA and GPUS < 2:
        raise Skipped("needs 2 GPUs: NCCL puts one rank on each")
    attention = REPEATABLE if CUDA else ["attention=window"]
    common = [*attention, "dtype=bf16", "micro_batch=1", "steps=30", "checkpoint.every=2"]
    runs.run("lost-whole", *common, ranks=2)
    process = runs.run("lost", *common, ranks=2, restarts=1, faults=[
        {"at": "step", "step": 12, "rank": 1, "do": "SIGKILL", "once": str(runs.folder / "lost.once")},
    ])
    took = process.when("rank 1 is gone") - process.when("fault: SIGKILL")
    expect(took < 15, f"the other rank ended {took:.0f} s later")
    return f"the other rank ended {took:.1f} s later; restarted: {runs.expect_same('lost', 'lost-whole')}"


def stall(runs: Runs) -> str:
    """What saves cost a run with about 1 GB of state, by the time from one step's begin to the next one's."""
    every, steps = (30, 125) if CUDA else (8, 41)  # so far apart that no save waits for the one before
    common = ["attention=window", "dtype=bf16" if CUDA else "dtype=fp32", f"steps={steps}", f"checkpoint.every={every}",
              "checkpoint.keep=1", "eval=none"]
    settings = runs.settings
    if CUDA:
        settings = [s for s in settings if not s.startswith("model")] + ["model=small", "global_batch=16", "micro_batch=8"]
    runs, cost = runs.but(settings), {}
    for background in ("true", "false"):
        name = f"stall-{background}"
        runs.run(name, *common, f"checkpoint.background={background}")
        notes = [json.loads(line) for line in (runs.folder / f"{name}.times").read_text().splitlines()]
        begins = {n["step"]: n["at"] for n in notes if "step" in n}
        saves = [n for n in notes if "saved" in n and n["saved"] < steps]
        expect(saves and not any(n["problem"] for n in saves), f"no saves, or failed ones: {saves}")
        spans = {step: begins[step + 1] - begins[step] for step in range(2, steps)}
        quiet = statistics.median(s for step, s in spans.items() if step % every >= 0.8 * every)  # writing is over, if ever
        # A copy that is on its way holds up the update of the step that follows, so both count.
        extra = [spans[s] + spans[s + 1] - 2 * quiet for n in saves if (s := n["saved"]) + 1 in spans and s > every]
        cost[background] = statistics.median(extra)
        host = statistics.median(n["stall"] for n in saves[1:])
        size, whole = saves[-1]["size"] / 1e9, statistics.median(n["seconds"] for n in saves[1:])
        cost[background + "-text"] = (
            f"{1e3 * cost[background]:.0f} ms (begin() {1e3 * host:.0f} ms, until committed {whole:.2f} s, "
            f"a step {1e3 * quiet:.0f} ms)"
        )
    share = cost["true"] / cost["false"]
    text = f"{size:.2f} GB: asynchronous {cost['true-text']}, synchronous {cost['false-text']}: {share:.1%}"
    expect(not CUDA or share < 0.1, f"not under 10 %: {text}")
    return text


CHECKS: dict[str, Callable[[Runs], str]] = {
    "kill-nsa": lambda runs: kills(runs, "nsa"),
    "kill-window": lambda runs: kills(runs, "window"),
    "elastic-zero1": lambda runs: elastic(runs, 1),
    "elastic-zero3": lambda runs: elastic(runs, 3),
    "lost-rank": lost,
    "hung-rank": hung,
    "nan-zero0-fp32": lambda runs: no_number(runs, 0, "fp32"),
    "nan-zero1-bf16": lambda runs: no_number(runs, 1, "bf16"),
    "nan-zero3-bf16": lambda runs: no_number(runs, 3, "bf16"),
    "sigterm-1-worker": lambda runs: sigterm(runs, 1),
    "sigterm-2-workers": lambda runs: sigterm(runs, 2),
    "stall": stall,  # last, and alone
}


def write_text(folder: Path) -> None:
    """Made-up documents: words of letters, by a fixed seed."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randrange(2, 8))) for _ in range(300)]
    for number in range(120):
        text = " ".join(generator.choices(words, k=generator.randrange(50, 3000)))
        (folder / f"{number:03d}.txt").write_text(text + "\n")


def settings_for(folder: Path, overrides: list[str]) -> list[str]:
    (folder / "text").mkdir()
    write_text(folder / "text")
    own = any(text.startswith("data=") for text in overrides)
    text = [] if own else [
        "data=files", f"data.paths=['{folder / 'text'}']", "data.validation_fraction=0.1", "tokenizer.vocab_size=300",
    ]
    tiny = ["model=tiny", "seq_len=1024", "global_batch=8", "micro_batch=4"]
    sizes = tiny if CUDA else [*TOY, "global_batch=4", "micro_batch=2"]
    return [
        *text, *sizes, f"runs_dir={folder}", f"data.cache_dir={folder / 'cache'}", "logger=none", "log.every=1", "eval.rows=4",
        "eval.every=20", "checkpoint.keep=3", f"device={'cuda' if CUDA else 'cpu'}", *overrides,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=230, help="seconds; a check that has not begun by then is not run")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one training")
    parser.add_argument("--jobs", type=int, default=9 if CUDA else 1, help="checks at the same time")
    parser.add_argument("--only", default=",".join(CHECKS), help=f"of {', '.join(CHECKS)}")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    chosen, begin = options.only.split(","), time.monotonic()
    if unknown := set(chosen) - CHECKS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose of {', '.join(CHECKS)}")
    folder = Path(tempfile.mkdtemp(prefix="sieve-faults-"))
    runs = Runs(folder, settings_for(folder, options.overrides), options.limit)
    found: dict[str, tuple[str, float, str]] = {}

    def check(name: str) -> None:
        started = time.monotonic()
        verdict = "ok"
        try:
            if started - begin > options.budget - 15:
                raise Failed(f"not run: the {options.budget:.0f} s of --budget are spent")
            text = CHECKS[name](runs)
        except Skipped as why:
            verdict, text = "skipped", str(why)
        except Exception as error:  # noqa: BLE001 - one check's trouble must not hide the others' outcome
            verdict, text = "FAILED", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        found[name] = (verdict, time.monotonic() - started, text)
        print(f"{time.monotonic() - begin:6.1f} s  {name}: {verdict}", flush=True)

    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(check, [name for name in chosen if name != "stall"]))
        if "stall" in chosen:
            check("stall")
    finally:
        runs.end_all()
        shutil.rmtree(folder, ignore_errors=True)
    device = f"{GPUS} x {torch.cuda.get_device_name(0)}" if CUDA else "CPU"
    print(f"\n{device}, Python {sys.version.split()[0]}, torch {torch.__version__}, {time.monotonic() - begin:.0f} s\n")
    for name in chosen:
        verdict, seconds, text = found[name]
        print(f"{name:18} {verdict:8} {seconds:5.0f} s  {' '.join(text.split())}")
    return int(any(verdict == "FAILED" for verdict, _, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
