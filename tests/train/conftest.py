"""Run directories as training would leave them, without training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sieve.train import partition
from sieve.train.callbacks.checkpoint import CheckpointConfig
from sieve.train.checkpoint import checkpoints, damage
from sieve.train.distributed import Place
from sieve.train.optim import OptimConfig, adamw
from sieve.train.run import main
from sieve.train.saver import Done, Saver
from sieve.train.state import RunState

ALONE = Place(0, 1, 0, torch.device("cpu"))


class PlainEngine:
    """A model and its optimizer as `sieve.train.engine.Engine` shows them at stage 0, without DeepSpeed."""

    replicated = True

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(torch.nn.Linear(width, 2 * width), torch.nn.BatchNorm1d(2 * width))
        self.optimizer = adamw(self.module, OptimConfig(), torch.device("cpu"))
        self.before_update = lambda: None

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.module(torch.randn(5, self.module[0].in_features)).square().sum().backward()
            self.before_update()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def pieces(self) -> list[partition.Piece]:
        return partition.pieces(0, self.module, None, self.optimizer)

    def refresh(self) -> None:
        pass


@pytest.fixture
def plain_engine() -> type[PlainEngine]:
    return PlainEngine


@pytest.fixture
def save_at() -> Callable[..., Done]:
    """save_at(run, *steps, engine=..., **settings of checkpoint) saves `run` at each step; the last outcome."""

    def save(run: RunState, *steps: int, engine: PlainEngine | None = None, **settings: object) -> Done:
        saver = Saver(CheckpointConfig(**{"keep": 9, **settings}), engine or PlainEngine(), ALONE)
        for step in steps:
            run.step, run.tokens = step, 10 * step
            saver.begin(run)
            done = saver.wait()
        saver.close()
        return done

    return save


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, ...) writes runs/name with `steps` logged steps of `tokens` tokens each; returns its directory.

    The loss is shared noise (one draw a step, the same for every run) on 3 + 5/sqrt(step), plus `offset`.
    """

    def make(
        name: str, *, steps: int = 40, tokens: int = 1000, offset: float = 0.0, step_seconds: float = 1.0,
        flops: float | None = 1e6, tag: str = "h", every: int = 1, config: dict | None = None,
        environment: dict | None = None,
    ) -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        noise = np.random.default_rng(0).normal(0, 0.1, steps + 1)
        rows = []
        for step in range(every, steps + 1, every):
            rows.append({
                "step": step, "tokens": step * tokens,
                "train/loss": 3 + 5 / step**0.5 + float(noise[step]) + offset,
                "perf/tokens_per_second": tokens / step_seconds * (0.1 if step == every else 1.0),
                "perf/step_seconds": step_seconds, "perf/peak_memory_bytes": 2**30,
                "data/tokens_hash": f"{tag}{step}", "data/epoch": 0,
            })
            if step % 20 == 0:
                rows[-1]["eval/loss"] = 3.5 + offset
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "name": name, "seed": 0, "steps": steps, "seq_len": 100, "global_batch": 10, "data": {"type": "python"},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
        command = ["sieve", "train", f"name={name}"]
        facts = {"device": "cpu", "command": command, "parameters": {"total": 5000, "active": 4000}}
        if flops is not None:
            facts["flops_per_token"] = {"attention": 0.4 * flops, "mlp": 0.6 * flops}
        (directory / "environment.json").write_text(json.dumps(facts | (environment or {})))
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a model and a text of toy size, with one MoE layer and NSA that has something to choose; the
    text's tokens are shared by all tests. To be completed by runs_dir, steps and what is tested."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnop"), size=size)) for size in random.integers(2, 8, 300)]
    for number, length in enumerate(random.integers(20, 400, 60)):
        (folder / f"{number:02d}.txt").write_text(" ".join(random.choice(words, size=length)) + "\n")
    return [
        "data=files", f"data.paths=['{folder}']", "data.validation_fraction=0.1",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}", "tokenizer.vocab_size=300", "model.num_layers=2",
        "model.hidden_size=32", "model.num_heads=4", "model.head_dim_qk=8", "model.head_dim_v=8",
        "model.intermediate_size=48", "model.moe.num_experts=4", "model.moe.expert_size=16", "seq_len=64",
        "global_batch=4", "micro_batch=2", "attention.kernel_size=8", "attention.kernel_stride=4",
        "attention.block_size=8", "attention.topk=4", "attention.window_size=16", "optim.lr=1e-2", "device=cpu",
        "logger=none", "eval.every=3", "eval.rows=4", "log.every=1", "checkpoint.every=2",
    ]


@pytest.fixture(scope="session")
def mixture(tiny_text, tmp_path_factory) -> list[str]:
    """tiny_text as one of two sources, with a phase of longer rows, fewer of them, packed by best fit, from 600 tokens
    on: after 3 steps."""
    folder = tmp_path_factory.mktemp("other")
    random = np.random.default_rng(1)
    for number, length in enumerate(random.integers(5, 300, 40)):
        (folder / f"{number:02d}.txt").write_text(" ".join(random.choice(["ab", "cde", "fg", "hij"], size=length)) + "\n")
    own = [text for text in tiny_text if text.startswith("data.") and "cache" not in text]
    sources = {"letters": own[0].partition("=")[2].strip("[]'"), "pairs": str(folder)}
    settings = ",".join(
        f"{name}:{{type:files,paths:['{path}'],validation_fraction:0.1,weight:{weight}}}"
        for (name, path), weight in zip(sources.items(), (0.75, 0.25))
    )
    phase = "{from_tokens:600,seq_len:128,global_batch:6,micro_batch:1,packing:best_fit,rope_factor:2," \
            "weights:{letters:0.5,pairs:0.5},upsample:{100:2.0}}"
    return [
        *(text for text in tiny_text if text not in own and text != "data=files"), f"data.sources={{{settings}}}",
        f"data.phases=[{phase}]", "data.name=mixture", "eval.rows=2",
    ]


@pytest.fixture
def one_rank() -> Iterator[Place]:
    """This process as the only one, on one CPU thread, with the process group open until the last test is over.

    DeepSpeed keeps groups of its first start for good, so that a second process group would not fit them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place = Place(0, 1, 0, torch.device("cpu"))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield place
    torch.set_num_threads(threads)


class Trainer:
    """Starts `sieve train` with faults (see faulty.py) in processes of their own, and reads what they leave.

    settings: overrides for all of its runs.
    """

    def __init__(self, settings: list[str], folder: Path) -> None:
        self.settings, self.folder = [*settings, f"runs_dir={folder}", "attention=full"], folder

    def start(self, name: str, *settings: str, ranks: int = 1, faults: list[dict] | None = None, restarts: int = 0):
        launcher = [sys.executable]
        if ranks > 1:
            launcher += [
                "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", f"--max-restarts={restarts}",
            ]
        # Signals and kills go to the run's process group alone.
        return subprocess.Popen(
            [*launcher, str(Path(__file__).with_name("faulty.py")), *self.settings, *settings, f"name={name}"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "FAULTS": json.dumps(faults or [])},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        )

    def here(self, name: str, *settings: str) -> int:
        """Exit code of the same run without faults in this process, which takes a fifth of the time; wants one_rank."""
        return main([*self.settings, *settings, f"name={name}"])

    def run(self, name: str, *settings: str, timeout: float = 300, **options) -> tuple[int, str]:
        """Exit code, and what came on stderr."""
        process = self.start(name, *settings, **options)
        try:
            error = process.communicate(timeout=timeout)[1]
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks, which are sessions of their own
            error = process.communicate()[1]
            raise AssertionError(f"{name} has not ended after {timeout} s: {error[-3000:]}") from None
        return process.returncode, error

    def rows(self, name: str) -> list[dict]:
        """The metrics, one row a step, without what depends on the clock."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "a step stands there twice"
        return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]

    def steps(self, name: str) -> list[int]:
        """Those that are saved, after a look at all their files."""
        there = checkpoints(self.folder / name)
        assert all(damage(path) is None for path in there.values())
        return list(there)

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
        metrics, until = self.folder / name / "metrics.jsonl", time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
                return
            time.sleep(0.01)


@pytest.fixture
def trainer(tiny_text: list[str], tmp_path: Path) -> Trainer:
    return Trainer(tiny_text, tmp_path)
