"""`sieve tokenizer`: trains a tokenizer or loads one, measures it on held-out text, exports it to transformers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from sieve.data.config import Config, DataConfig, TokenizerConfig
from sieve.train.command import describe_keys, log_to_stderr, run_command

ROOT = "train_tokenizer"
USAGE = """\
usage: sieve tokenizer [KEY=VALUE | GROUP=CHOICE ...] [--cfg job] [--help]

Train a SentencePiece tokenizer on a sample of any text, say how many bytes of held-out text a token stands for, and
write it as tokenizer.model and in the format of transformers.

  sieve tokenizer data=files data.paths='["books/*.jsonl.zst"]' out=tokenizers/books
  sieve tokenizer tokenizer=unigram32k tokenizer.vocab_size=16000 tokenizer.special_tokens='["<|user|>"]'
  sieve tokenizer tokenizer=huggingface tokenizer.path=gpt2 data=books    measure somebody's tokenizer on your text
  sieve prepare tokenizer.path=tokenizers/books data=books
"""


class TokenizerCommand(Config):
    """What `sieve tokenizer` takes."""

    out: str | None = Field(None, min_length=1, description="folder to write; null: tokenizers/DATA-TOKENIZER")
    held_out_bytes: int = Field(4_000_000, gt=0, description="of validation text to measure it on")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for a user's mistake."""
    from sieve.train.overrides import load

    return run_command(
        "sieve tokenizer", sys.argv[1:] if argv is None else argv, run=run,
        load=lambda overrides: load(TokenizerCommand, ROOT, overrides),
        help_text=lambda: describe_keys(USAGE, TokenizerCommand, ROOT),
    )


def run(config: TokenizerCommand) -> int:
    """Make, measure and write the tokenizer. ValueError if `out` is there already, before any work."""
    from sieve.data.cache import cache_root, staged
    from sieve.data.prepare import make_tokenizer, text_passes
    from sieve.data.tokenizer_export import described, save
    from sieve.data.tokenizer_report import compare_export, held_out, measure

    log_to_stderr(logging.INFO)
    out = Path(config.out or f"tokenizers/{config.data.name}-{config.tokenizer.name}").expanduser()
    if out.exists():
        raise ValueError(f"out={out} is there already; give another, or remove it")
    start = time.monotonic()
    passes = text_passes(config.data)
    encoder = make_tokenizer(cache_root(config.data.cache_dir), *passes[0], config.tokenizer)
    made = time.monotonic() - start
    texts = list(held_out(passes, config.tokenizer.sample_bytes, config.held_out_bytes))
    report: dict[str, Any] = {
        "tokenizer": described(encoder), "settings": config.tokenizer.model_dump(mode="json"),
        "source": passes[0][0].description, "held_out": measure(encoder, texts), "seconds": round(made, 2),
    }
    with staged(out) as folder:
        save(encoder, folder)
        report["export"] = compare_export(encoder, folder, texts)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _print(report, out)
    return 0


def _print(report: dict[str, Any], out: Path) -> None:
    held, about, export = report["held_out"], report["tokenizer"], report["export"]
    print(f"{about['kind']}, {about['vocab_size']:,} pieces, hash {about['hash']}, {report['seconds']} s")
    if held["tokens"]:
        print(
            f"held-out text: {held['bytes']:,} bytes in {held['documents']:,} documents, {held['tokens']:,} tokens: "
            f"{held['bytes_per_token']:.3f} bytes per token; {held['vocabulary_seen']:.1%} of the vocabulary occurs"
        )
        print(f"transformers gives the same ids for {export['equal']} of {export['pieces']} pieces of it")
    else:
        print("no held-out text in the sample: raise data.validation_fraction or tokenizer.sample_bytes to measure it")
    choice = "tokenizer=huggingface " if about["kind"] == "huggingface" else ""
    print(f"written to {out}; use it with {choice}tokenizer.path={out}")


if __name__ == "__main__":
    raise SystemExit(main())
