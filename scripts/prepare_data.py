"""`sieve prepare`: any source of text to token shards. Here and not in data, since Hydra's overrides are train's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from sieve.data.config import Config, DataConfig, TokenizerConfig
from sieve.train.command import describe_keys, log_to_stderr, run_command

ROOT = "prepare_data"
USAGE = """\
usage: sieve prepare [KEY=VALUE | GROUP=CHOICE ...] [--cfg job] [--help]

Tokenize text into shards that training reads by memory map. Stopped or killed, the same command goes on.

  sieve prepare data=files data.paths='["books/*.jsonl.zst"]' out=shards/books
  sieve prepare data=fineweb-edu tokenizer.path=tokenizers/mine out=shards/web workers=32
  sieve train data=shards data.paths=shards/books
"""


class PrepareConfig(Config):
    """What `sieve prepare` takes."""

    out: str | None = Field(None, min_length=1, description="folder to write; null: shards/DATA-TOKENIZER")
    shard_tokens: int = Field(100_000_000, gt=0, description="a shard ends with the document that reaches it")
    workers: int | None = Field(None, gt=0, description="processes that tokenize; null: the cores this process may use")
    save_every: float = Field(20, gt=0, description="seconds of work that a kill costs at most")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when all is prepared, 130 when it was stopped by a signal before, 2 for a user's mistake."""
    from sieve.train.overrides import load

    return run_command(
        "sieve prepare", sys.argv[1:] if argv is None else argv, run=run,
        load=lambda overrides: load(PrepareConfig, ROOT, overrides),
        help_text=lambda: describe_keys(USAGE, PrepareConfig, ROOT),
    )


def run(config: PrepareConfig) -> int:
    """Prepare as `config` says; see `main` for the exit code."""
    from sieve.data.shard_job import prepare_shards
    from sieve.train.signals import StopSignal

    log_to_stderr(logging.INFO)
    out = Path(config.out or f"shards/{config.data.name}-{config.tokenizer.name}").expanduser()
    with StopSignal() as stop:
        outcome = prepare_shards(
            config.data, config.tokenizer, out, shard_tokens=config.shard_tokens, save_every=config.save_every,
            processes=config.workers or len(os.sched_getaffinity(0)), stop=lambda: stop.requested is not None,
        )
    for part, about in outcome.manifest["parts"].items():
        print(f"{part:11}{about['documents']:>14,} documents {about['tokens']:>18,} tokens")
    if not outcome.finished:
        print(f"stopped and saved in {out}; the same command goes on from there")
        return 130
    print(f"{out} is complete; train from it with: sieve train data=shards data.paths={out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
