"""How much of the tokenizer's own speed `sieve prepare` keeps, per core, on the same text in the same run.

The rival is SentencePiece alone: texts are read and cut before the clock starts, their ids are thrown away. `sieve
prepare` reads, checks, tokenizes, writes, syncs and keeps its journal within its time. Both run on the same cores, in
turn, `rounds` times; a ratio is that of one round. It is given twice: by the clock, which other work on the machine
disturbs, and by the CPU time of all processes, which counts starting and the tokenizing processes' imports against
`sieve prepare`. No ratio is given unless both made the same number of tokens.

    python -m sieve.scripts.bench_prepare "books/*.jsonl.zst" --tokenizer tokenizers/books --out benchmarks/DATE-prepare
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.shard_job import BATCH_CHARS, prepare_shards
from sieve.data.sources import source_of
from sieve.data.tokenizer import PIECE_CHARS, Tokenizer, cut
from sieve.scripts.bench.arguments import at_least

TARGET = 0.85  # of the tokenizer's speed per core
PACKAGES = ("sieve-lm", "sentencepiece", "numpy", "pyarrow", "zstandard", "tokenizers")


def _alone(paths: list[str], model: str, share: int, shares: int, core: int, barrier: Any, results: Any) -> None:
    """In a process on `core`: the ids of every `shares`-th document from `share` on, timed from the barrier."""
    os.sched_setaffinity(0, {core})
    processor = Tokenizer.load(model)._processor
    batches: list[list[bytes]] = [[]]
    held = 0
    for number, document in enumerate(source_of(DataConfig(type="files", paths=paths))):
        if number % shares == share:
            batches[-1] += [piece.encode() for piece in cut(document.text, PIECE_CHARS)]
            held += len(document.text)
            if held >= BATCH_CHARS:
                batches.append([])
                held = 0
    barrier.wait()
    start, cpu, tokens = time.monotonic(), time.process_time(), 0
    for batch in batches:
        tokens += sum(map(len, processor.encode(batch, num_threads=1)))
    results.put((start, time.monotonic(), time.process_time() - cpu, tokens))


def _prepare(paths: list[str], model: str, cores: list[int], results: Any) -> None:
    """In a process on `cores`: one `sieve prepare` with as many workers."""
    os.sched_setaffinity(0, set(cores))
    with tempfile.TemporaryDirectory(dir=os.environ.get("SIEVE_BENCH_DIR")) as folder:
        data = DataConfig(type="files", paths=paths, cache_dir=f"{folder}/cache")
        start = partial(
            prepare_shards, data, TokenizerConfig(path=model), Path(folder) / "out", shard_tokens=100_000_000,
            save_every=20.0, processes=len(cores),
        )
        start(stop=lambda: True)  # imports, and writes the tokenizer for transformers: seconds, once a folder
        cpu = _cpu_seconds()
        outcome = start()
        cpu = _cpu_seconds() - cpu
        documents = sum(part["documents"] for part in outcome.manifest["parts"].values())
        results.put((outcome.seconds, cpu, outcome.tokens - 2 * documents))


def _cpu_seconds() -> float:
    """Of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(paths: list[str], model: str, cores: list[int]) -> dict[str, float]:
    """One round on `cores`: seconds and tokens of both; tokens without bos and eos. RuntimeError if they differ."""
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(len(cores))
    workers = [
        context.Process(target=_alone, args=(paths, model, i, len(cores), core, barrier, results))
        for i, core in enumerate(cores)
    ]
    found = _run(workers, results)
    alone = max(end for _, end, _, _ in found) - min(start for start, _, _, _ in found)
    alone_cpu, counted = (sum(column) for column in list(zip(*found))[2:])
    ((seconds, cpu, tokens),) = _run([context.Process(target=_prepare, args=(paths, model, cores, results))], results)
    if tokens != counted:
        raise RuntimeError(f"sieve prepare made {tokens} tokens, the tokenizer alone {counted}")
    return {
        "tokens": tokens, "tokenizer_seconds": alone, "prepare_seconds": seconds, "ratio": alone / seconds,
        "tokenizer_cpu_seconds": alone_cpu, "prepare_cpu_seconds": cpu, "cpu_ratio": alone_cpu / cpu,
        "load": os.getloadavg()[0],
    }


def _run(processes: Sequence[Any], results: Any) -> list[Any]:
    for process in processes:
        process.start()
    found = []
    while len(found) < len(processes):
        try:
            found.append(results.get(timeout=1))
        except Exception as error:  # queue.Empty of the context's own queue
            if any(process.exitcode for process in processes):
                raise RuntimeError("a measured process failed; its message is above") from error
    for process in processes:
        process.join()
    return found


def origin(argv: Sequence[str]) -> dict[str, Any]:
    """Command, commit, versions and hardware of this run."""
    from sieve.train.environment import git_state  # imports torch, which every measured process would do too

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    git = git_state(Path(__file__).resolve().parent) or {}
    return {
        "command": "python -m sieve.scripts.bench_prepare " + " ".join(argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": git.get("commit"),
        "changed": bool(git.get("diff") or git.get("untracked")), "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "cores": sorted(os.sched_getaffinity(0)), "load_at_start": os.getloadavg()[0],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if the median ratio reaches the target on every number of cores, else 1; 2 for a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="sieve bench prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", help="text, as data.paths")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece model, or a folder of `sieve tokenizer`")
    parser.add_argument("--cores", type=at_least(1), nargs="+", default=[1, 2], help="numbers of cores to measure on")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--out", type=Path, help="folder for prepare.json")
    options = parser.parse_args(arguments)
    if max(options.cores) > len(os.sched_getaffinity(0)):
        parser.error(f"--cores {max(options.cores)}: this process may use {len(os.sched_getaffinity(0))}")
    try:  # here, and not in each of the processes
        source_of(DataConfig(type="files", paths=options.paths), named="PATHS")
        Tokenizer.load(options.tokenizer)
    except ValueError as error:
        print(f"sieve bench prepare: {error}", file=sys.stderr)
        return 2
    run = origin(arguments) | {"target": TARGET, "results": []}
    available = run["cores"]
    missed = False
    for number in options.cores:
        rounds = [measure(options.paths, options.tokenizer, available[:number]) for _ in range(options.rounds)]
        ratio, cpu_ratio = (statistics.median(r[key] for r in rounds) for key in ("ratio", "cpu_ratio"))
        missed |= ratio < TARGET
        run["results"].append({"cores": number, "median_ratio": ratio, "median_cpu_ratio": cpu_ratio, "rounds": rounds})
        speeds = [
            statistics.median(r["tokens"] / r[f"{who}_seconds"] / number for r in rounds) for who in ("tokenizer", "prepare")
        ]
        print(
            f"{number} cores: tokenizer alone {speeds[0]:,.0f}, sieve prepare {speeds[1]:,.0f} tokens/s per core; "
            f"ratio {ratio:.3f} ({', '.join(format(r['ratio'], '.3f') for r in rounds)}), by CPU time {cpu_ratio:.3f} "
            f"({', '.join(format(r['cpu_ratio'], '.3f') for r in rounds)})", flush=True,
        )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "prepare.json").write_text(json.dumps(run, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
