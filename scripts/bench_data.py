"""`sieve bench data`: reading token stores beside a plain numpy loop and beside streaming with tokenization on the fly.

In one process, in interleaved rounds, in tokens per second of CPU time, hence per core. The plain loop reads a flat
file of the same tokens in rows, as many trainers do: no documents, no shuffle, no state, no hash. The rival streams the
same text through datasets and torchdata's StatefulDataLoader, tokenizes it with the same tokenizer and cuts rows. Last,
what reading costs a loop that is busy in Python, as a training loop that launches kernels is: read in the loop itself,
in a thread (what data.workers are), and in a process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sieve.data.loader import RowLoader, Step
from sieve.data.mixture import Corpus, build_corpus
from sieve.data.phases import ONLY, Phase
from sieve.data.sources import source_of
from sieve.data.tokenizer import Tokenizer
from sieve.data.tokens import Tokens, lengths
from sieve.scripts.bench.arguments import at_least
from sieve.train.environment import git_state
from sieve.train.overrides import load_config

PACKINGS = ("concatenate", "best_fit", "document")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sieve bench data", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as of `sieve train`: data, tokenizer, seq_len, global_batch")
    add("--tokens", type=at_least(1), default=20_000_000, help="read in a round (default %(default)s)")
    add("--rival-bytes", type=at_least(0), default=8_000_000, help="text streamed a round; 0: no rival (default %(default)s)")
    add("--rounds", type=at_least(1), default=5, help="interleaved rounds (default %(default)s)")
    add("--busy-ms", type=at_least(0, float), default=100.0, help="Python work a step in the last part (default %(default)s)")
    add("--out", type=Path, default=Path("benchmarks/data"), help="folder of data.json (default %(default)s)")
    return parser.parse_intermixed_args(argv)


def flat_file(store: Tokens, path: Path, limit: int) -> np.dtype:
    """The store's first documents end to end, at least `limit` tokens if there are so many; the dtype they have."""
    written = 0
    with path.open("wb") as file:
        for index in range(store.num_documents):
            ids = np.ascontiguousarray(store.document(index))
            file.write(ids.tobytes())
            written += len(ids)
            if written >= limit:
                break
    return ids.dtype


def plain_loop(path: Path, dtype: np.dtype, seq_len: int, tokens: int) -> int:
    """Rows of tokens and of next tokens, int64, from a memory map, over and over; returns how many tokens."""
    data = np.memmap(path, dtype, "r")
    rows = (len(data) - 1) // seq_len
    for row in range(tokens // seq_len):
        start = row % rows * seq_len
        torch.from_numpy(data[start : start + seq_len].astype(np.int64))
        torch.from_numpy(data[start + 1 : start + 1 + seq_len].astype(np.int64))
    return tokens // seq_len * seq_len


def our_loop(loader: Iterator[Step], tokens: int) -> int:
    """Steps of the loader; returns how many tokens, padding left out."""
    read = 0
    while read < tokens:
        step = next(loader)
        read += round(step.tokens * (1 - step.metrics["data/padding_share"]))
    return read


def rival_loop(file: Path, tokenizer: Tokenizer, seq_len: int) -> int:
    """The text of `file` (JSON lines) streamed, tokenized and cut into rows; returns how many tokens."""
    from datasets import load_dataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    stream = load_dataset("json", data_files=str(file), split="train", streaming=True)

    def rows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = np.concatenate([
            np.concatenate(([tokenizer.bos_id], encoded, [tokenizer.eos_id])) for encoded in tokenizer.encode(batch["text"])
        ])
        whole = len(ids) // seq_len
        return {"input_ids": list(ids[: whole * seq_len].reshape(whole, seq_len))}

    packed = stream.map(rows, batched=True, batch_size=16, remove_columns=stream.column_names or ["text"])
    loader = StatefulDataLoader(packed.with_format("torch"), batch_size=1, num_workers=0)
    return sum(batch["input_ids"].numel() for batch in loader)


def per_core(work: Callable[[], int]) -> float:
    """Tokens per second of this process's CPU time."""
    start = time.process_time()
    tokens = work()
    return tokens / (time.process_time() - start)


class _Steps(torch.utils.data.IterableDataset):
    """A loader's steps as torch's DataLoader hands them to a process."""

    def __init__(self, loader: RowLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[Step]:
        return iter(self._loader)


def in_process(loader: RowLoader, ahead: int) -> Iterator[Step]:
    """`loader` read by a process that stays `ahead` steps ahead: what a thread is compared with. Tensors come through
    shared memory."""
    return iter(torch.utils.data.DataLoader(
        _Steps(loader), batch_size=None, num_workers=1, prefetch_factor=ahead, collate_fn=_as_it_is,
        multiprocessing_context="fork",
    ))


def _as_it_is(step: Step) -> Step:
    return step


def busy(work: int) -> None:
    """Python work that holds the interpreter's lock, with calls into torch as a training loop has them."""
    x = torch.zeros(8)
    for _ in range(work):
        x.add_(1.0)


def loop_seconds(steps: Iterator[Any] | None, work: int, count: int) -> tuple[float, float]:
    """Medians over `count` steps of a busy loop: seconds of a step, and of them, waiting for data."""
    whole, waited = [], []
    for _ in range(count):
        start = time.perf_counter()
        if steps is not None:
            next(steps)
        waited.append(time.perf_counter() - start)
        busy(work)
        whole.append(time.perf_counter() - start)
    return statistics.median(whole), statistics.median(waited)


def busy_loops(store: Tokens, phase: Phase, milliseconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """By way of reading: seconds of a step and of its wait for data, medians over rounds."""
    start = time.perf_counter()
    busy(20_000)
    work = round(20_000 * milliseconds / 1000 / (time.perf_counter() - start))
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name in ("no data", "in the loop", "thread", "process"):
            loader = RowLoader({ONLY: store}, [phase], workers=int(name == "thread"))
            steps = None if name == "no data" else in_process(loader, 2) if name == "process" else loader
            if steps is not None:
                next(steps)
            found.setdefault(name, []).append(loop_seconds(steps, work, 10))
            loader.close()
            del steps  # ends the process
    return {
        name: {"step_seconds": statistics.median(s for s, _ in pairs), "wait_seconds": statistics.median(w for _, w in pairs)}
        for name, pairs in found.items()
    }


def measure(corpus: Corpus, options: argparse.Namespace, config: Any, folder: Path) -> dict[str, Any]:
    store, seq_len = corpus.train[ONLY], config.seq_len
    dtype = flat_file(store, folder / "flat.bin", options.tokens)
    loaders = {
        packing: RowLoader({ONLY: store}, [replace(config.phases[0], packing=packing)]) for packing in PACKINGS
    }
    work: dict[str, Callable[[], int]] = {
        "plain numpy loop": lambda: plain_loop(folder / "flat.bin", dtype, seq_len, options.tokens),
        **{f"sieve, {p}": lambda loader=loader: our_loop(loader, options.tokens) for p, loader in loaders.items()},
    }
    if options.rival_bytes:
        text = folder / "text.jsonl"
        with text.open("w", encoding="utf-8") as file:
            for document in source_of(config.data).sample(options.rival_bytes):
                file.write(json.dumps({"text": document.text}) + "\n")
        work["datasets + StatefulDataLoader"] = lambda: rival_loop(text, corpus.tokenizer, seq_len)
    rates: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(options.rounds + 1):
        for name, call in work.items():
            rate = per_core(call)
            if round_:  # the first warms the page cache
                rates[name].append(rate)
    padding = {
        packing: statistics.fmean(next(loader).metrics["data/padding_share"] for _ in range(50))
        for packing, loader in loaders.items()
    }
    sizes = lengths(store)
    return {
        "tokens_per_cpu_second": rates,
        "padding_share": padding,
        "busy_loop": busy_loops(store, config.phases[0], options.busy_ms, min(3, options.rounds)),
        "text": {
            "name": config.data.name, "tokens": store.num_tokens, "documents": store.num_documents,
            "median_document": float(np.median(sizes)), "mean_document": float(sizes.mean()),
        },
        "seq_len": seq_len, "global_batch": config.global_batch, "micro_batch": config.micro_batch,
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a table."""
    medians = {name: statistics.median(values) for name, values in found["tokens_per_cpu_second"].items()}
    plain, rival = medians["plain numpy loop"], medians.get("datasets + StatefulDataLoader")
    text = found["text"]
    lines = [
        f"{text['name']}: {text['tokens']:,} tokens in {text['documents']:,} documents (median "
        f"{text['median_document']:,.0f}); rows of {found['seq_len']:,}, {found['global_batch']} a step in micro-batches of "
        f"{found['micro_batch']}",
        f"{'':34}{'M tokens/s per core':>20}{'of plain':>10}{'of rival':>10}",
    ]
    for name, rate in medians.items():
        beside = "" if rival is None else f"{rate / rival:10.1f}"
        lines.append(f"{name:34}{rate / 1e6:20.2f}{rate / plain:10.2f}{beside}")
    lines.append(f"{'a busy loop of ' + str(found['busy_ms']) + ' ms a step':34}{'step, ms':>20}{'wait, ms':>10}")
    for name, times in found["busy_loop"].items():
        lines.append(f"{name:34}{1e3 * times['step_seconds']:20.1f}{1e3 * times['wait_seconds']:10.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        config = load_config([*options.overrides, "device=cpu"])
        if config.data.sources:
            raise ValueError(f"data={config.data.name} is a mixture; name one source")
        if options.tokens < config.seq_len:
            raise ValueError(f"--tokens {options.tokens} is less than a row: seq_len={config.seq_len}")
        corpus = build_corpus(config.data, config.tokenizer)
    except ValueError as error:
        print(f"sieve bench data: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(corpus, options, config, Path(folder))
    found["busy_ms"] = options.busy_ms
    found["environment"] = {
        "command": sys.argv, "git": git_state(Path(__file__).resolve().parent), "platform": platform.platform(),
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "python": platform.python_version(),
        "packages": {
            name: metadata.version(name)
            for name in ("torch", "numpy", "xxhash", "datasets", "torchdata", "sentencepiece")
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))
    return 0


def _cpu() -> str:
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
