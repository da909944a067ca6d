"""`sieve bench training`: whole optimizer steps of models with full attention and with NSA, on one device.

Each case is a process of its own that builds the model under the trainer's engine, steps on synthetic rows and reports the
median step, tokens per second, MFU (the model's own FLOPs, causal half), peak memory and a breakdown that adds up to the step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sieve.scripts.bench.arguments import at_least

EXAMPLES = """examples:
  sieve bench training                                                small and 1b, full and nsa, 8k to 64k
  sieve bench training --models 1b --attention nsa --lengths 262144 --checkpointing none,attention,full
  sieve bench training --models 1b --lengths 8192 --compile true,false             with and without torch.compile
  sieve bench training --models small --lengths 8192 --check-losses 100            the fast path's losses beside the plain one's
  sieve bench training --models tiny --lengths 256 --vocab 300 --device cpu        without a GPU
KEY=VALUE arguments are settings of `sieve train` for every case. --checkpointing and --micro-tokens: the first that fits is
taken. attention full is cuDNN's where a row is one document, full:varlen FlashAttention-2's. Results are written after each
case. Exit status: 1 if a case failed otherwise than by its memory or its time.
"""


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sieve bench training", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of `sieve train` for every case")
    add("--models", type=_list, default=["small", "1b"], help="of configs/model (default small,1b)")
    add("--attention", type=_list, default=["full", "nsa"], help="of full, full:varlen, nsa, window (default full,nsa)")
    add("--lengths", type=_numbers, default=[8192, 16384, 32768, 65536], help="tokens of a row (default 8192 to 65536)")
    add("--compile", type=_list, default=["auto"], help="of auto, true, false (default auto)")
    add("--checkpointing", type=_list, default=["none", "block"], help="activation_checkpointing (default none,block)")
    add("--micro-tokens", type=_numbers, default=[32768, 16384, 8192], help="of a micro-batch (default 32768,16384,8192)")
    add("--tokens", type=at_least(1), default=65536, help="of a step, at least one row (default %(default)s)")
    add("--documents", type=at_least(1), default=1, help="of a row, cut at random places (default %(default)s)")
    add("--vocab", type=at_least(1), default=32768, help="(default %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--warmup", type=at_least(0), default=4, help="steps (default %(default)s)")
    add("--steps", type=at_least(1), default=20, help="that are timed (default %(default)s)")
    add("--seconds", type=float, default=30.0, help="after which a case times no more steps (default %(default)s)")
    add("--limit", type=float, default=240.0, help="seconds of a case in all, compilation too (default %(default)s)")
    add("--no-profile", action="store_true", help="no breakdown")
    add("--check-losses", type=at_least(1), metavar="N", help="instead: N steps of the fast path beside the plain one")
    add("--out", type=Path, default=Path("benchmarks/training"), help="folder of JSON and markdown (default %(default)s)")
    options = parser.parse_intermixed_args(argv)
    wrong = [text for text in options.settings if "=" not in text]
    if wrong:
        parser.error(f"{wrong[0]} is not KEY=VALUE")
    for name, allowed in {"attention": {"full", "full:varlen", "nsa", "window"}, "compile": {"auto", "true", "false"}}.items():
        if unknown := set(getattr(options, name)) - allowed:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is not of {', '.join(sorted(allowed))}")
    if options.documents > min(options.lengths):
        parser.error(f"--documents {options.documents} does not fit into rows of {min(options.lengths)} tokens")
    return options


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in _list(text)]
    if not numbers or min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _overrides(options: argparse.Namespace, case: dict[str, Any], cuda: bool) -> list[str]:
    """The settings of `sieve train` that a case stands for."""
    kind, _, kernel = case["attention"].partition(":")
    rows = max(1, options.tokens // case["length"])
    micro = min(max(1, case["micro_tokens"] // case["length"]), rows)
    rows = rows // micro * micro
    found = [
        f"model={case['model']}", f"attention={kind}", f"seq_len={case['length']}", f"global_batch={rows}",
        f"micro_batch={micro}", f"compile={case['compile']}", f"activation_checkpointing={case['checkpointing']}",
        f"device={options.device}", f"dtype={'bf16' if cuda else 'fp32'}", "steps=1000000",
    ]
    if kind == "full" and cuda and options.documents == 1 and kernel != "varlen":
        found.append("attention.dense_impl=cudnn")
    return [*found, *options.settings]


def _check(options: argparse.Namespace, cases: list[dict[str, Any]], cuda: bool) -> None:
    """ConfigError for settings that no case could be built from: each would find it out in a process of its own."""
    from sieve.train.overrides import load_config

    for case, keep in itertools.product(cases, options.checkpointing):
        load_config(_overrides(options, case | {"checkpointing": keep, "micro_tokens": options.micro_tokens[0]}, cuda))


def run_case(job: dict[str, Any], limit: float) -> dict[str, Any]:
    """A case in a process of its own: what it reports, or what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        job = job | {"out": f"{folder}/result.json"}
        command = [sys.executable, "-m", "sieve.scripts.bench.training_case", json.dumps(job)]
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True, env=environment)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit:.0f} s (--limit)", "slow": True}
        try:
            found = json.loads(Path(job["out"]).read_text())
        except OSError:
            found = {"error": f"ended with {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}"[:300]}
        if "error" in found:
            print(done.stderr[-6000:], file=sys.stderr, flush=True)
        return found


def _measure(options: argparse.Namespace, case: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """The case with the first checkpointing and micro-batch that fit into memory, less of them first given up last."""
    found: dict[str, Any] = {}
    tried = set()
    for keep, micro in itertools.product(options.checkpointing, options.micro_tokens):
        row = case | {"checkpointing": keep, "micro_tokens": micro}
        settings = _overrides(options, row, cuda)
        if tuple(settings) in tried:
            continue
        tried.add(tuple(settings))
        name = f"{case['model']}-{case['attention'].replace(':', '-')}-{case['length']}-{case['compile']}"
        profile = None if options.no_profile else str(options.out / "profile" / name)
        began = time.perf_counter()
        found = row | {"settings": settings} | run_case(
            {"what": "measure", "overrides": settings, "vocab": options.vocab, "documents": options.documents,
             "warmup": options.warmup, "steps": options.steps, "seconds": options.seconds, "profile": profile},
            options.limit,
        ) | {"case_seconds": time.perf_counter() - began}
        if "out_of_memory" not in found:
            break
    return found


def _check_losses(options: argparse.Namespace, case: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """Losses of the fast path, of the plain one, and of the plain one rounded otherwise: the yardstick."""
    row = case | {"checkpointing": options.checkpointing[0], "micro_tokens": options.micro_tokens[0]}
    plain = ["compile=false", "loss.impl=torch"]
    ways = {
        "fast": [], "plain": plain, "plain, other micro-batches": [*plain, "micro_batch=1", "loss.chunk_size=768"],
    }
    found: dict[str, Any] = dict(row)
    for way, extra in ways.items():
        settings = [*_overrides(options, row, cuda), *extra]
        job = {"what": "losses", "overrides": settings, "vocab": options.vocab, "documents": options.documents,
               "steps": options.check_losses}
        found[way] = run_case(job, options.limit) | {"settings": settings}
    if all("losses" in found[way] for way in ways):
        base = found["plain"]["losses"]
        for way in ("fast", "plain, other micro-batches"):
            gaps = [abs(a - b) for a, b in zip(found[way]["losses"], base)]
            found[way] |= {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "last": gaps[-1]}
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the cases; 0 when each was measured, did not fit or took too long, 1 when one failed in another way, 2 for a
    mistake, before any of them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _arguments(argv)
    import torch

    from sieve.scripts.bench.report import origin, write_json
    from sieve.scripts.bench.training_report import case_line, loss_lines, markdown, table
    from sieve.train.mistakes import ConfigError

    cuda = options.device != "cpu"
    if cuda and not torch.cuda.is_available():
        print("sieve bench training: needs an NVIDIA GPU, and torch sees none; or --device cpu", file=sys.stderr)
        return 2
    cases = [
        {"model": model, "attention": attention, "length": length, "compile": compiled}
        for model in options.models for length in options.lengths for compiled in options.compile
        for attention in options.attention
    ]
    try:
        _check(options, cases, cuda)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"sieve bench training: {line}", file=sys.stderr)
        return 2
    run = origin(["training", *argv]) | {"vocab": options.vocab, "documents": options.documents, "rows": []}
    name = "losses" if options.check_losses else "training"
    for number, case in enumerate(cases, 1):
        if options.check_losses:
            row = _check_losses(options, case, cuda)
            text = loss_lines(row)
            failed = any("error" in row[way] or "out_of_memory" in row[way] for way in row if isinstance(row[way], dict))
        else:
            row = _measure(options, case, cuda)
            text, failed = case_line(row), "error" in row and not row.get("slow")
        row["failed"] = failed
        run["rows"].append(row)
        print(f"[{number}/{len(cases)}] {text}", flush=True)
        write_json(options.out / f"{name}.json", run)
        (options.out / f"{name}.md").write_text(markdown(run, bool(options.check_losses)))
    print("\n" + ("\n".join(map(loss_lines, run["rows"])) if options.check_losses else table(run["rows"])), flush=True)
    return int(any(row["failed"] for row in run["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
