"""`sieve generate CHECKPOINT --prompt TEXT`: continue texts with a trained model."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sieve.train.command import is_for_the_user, log_to_stderr

EPILOG = """\
  sieve generate runs/twin-nsa --prompt "def main" --max-tokens 100
  sieve generate exported/ --prompt-file notes.txt --temperature 0.8 --top-p 0.95 --stop '\\n\\n'
  echo "import os" | sieve generate my-run --prompt -
"""


def parser() -> argparse.ArgumentParser:
    from sieve.eval.config import Sampling

    fields = Sampling.model_fields
    made = argparse.ArgumentParser(
        prog="sieve generate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("checkpoint", help="a run (its newest checkpoint), a checkpoint's folder, or an exported model")
    made.add_argument("--prompt", action="append", default=[], help="text to continue; - is standard input; repeatable")
    made.add_argument("--prompt-file", action="append", type=Path, default=[], help="a file with such a text; repeatable")
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        kind = int if name in ("max_tokens", "seed") else float
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=fields[name].default, help="(%(default)s)")
    made.add_argument("--stop", action="append", default=[], help="end before this text; \\n and \\t are understood")
    made.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    made.add_argument("--prefill", type=int, help="prompt tokens taken in at a time (all)")
    made.add_argument("--no-stream", action="store_true", help="print a text when it is complete")
    made.add_argument("--runs-dir", default="runs", help="where runs given by name lie")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after a message for a user's mistake."""
    options = parser().parse_args(argv)
    log_to_stderr(logging.WARNING)
    try:
        return _run(options)
    except ValueError as error:
        if not is_for_the_user(error):
            raise
        print(f"sieve generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _standard_input() -> str:
    """All of it, its line ends as those of a file. ValueError when it is not UTF-8: Python's own reading of it depends on the
    locale and may let such bytes pass, for the tokenizer to stumble over."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: standard input is not UTF-8: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _run(options: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from sieve.eval.config import Sampling
    from sieve.eval.generate import generate_text
    from sieve.eval.load import place_and_precision
    from sieve.train.load import open_model

    if options.prompt.count("-") > 1:
        raise ValueError("--prompt -: is given twice, and standard input can be read once; use --prompt-file")
    prompts = [_standard_input() if prompt == "-" else prompt for prompt in options.prompt]
    for path in options.prompt_file:
        try:
            prompts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {path}: {error}") from error
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, --prompt - for standard input, or --prompt-file PATH")
    if options.prefill is not None and options.prefill < 1:
        raise ValueError(f"--prefill {options.prefill}: must be at least 1")
    try:
        sampling = Sampling(
            max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ValueError(f"--{name} {first['input']}: {first['msg']}") from error
    device, dtype = place_and_precision(options.device, options.dtype)
    loaded = open_model(options.checkpoint, options.runs_dir, device, dtype).loaded
    if loaded.text is None:
        raise ValueError(f"{options.checkpoint} has no tokenizer: put its tokenizer.model or tokenizer.json there")
    text = loaded.text
    streaming = len(prompts) == 1 and not options.no_stream
    if streaming:
        print(prompts[0], end="", flush=True)
    start = time.monotonic()

    def show(row: int, piece: str) -> None:
        if streaming:
            print(piece, end="", flush=True)

    found = generate_text(
        loaded.decoder, text.prompt, text.decode, prompts, sampling, show=show, prefill=options.prefill,
        stop=[stop.replace("\\n", "\n").replace("\\t", "\t") for stop in options.stop],
        stop_ids=[] if options.ignore_eos or text.eos_id is None else [text.eos_id],
    )
    if streaming:
        print()
    else:
        for number, (prompt, piece) in enumerate(zip(prompts, found)):
            print(f"{'' if number == 0 else chr(10)}{prompt}{piece}")
    seconds = time.monotonic() - start
    print(f"{len(prompts)} texts in {seconds:.1f} s" if len(prompts) > 1 else f"{seconds:.1f} s", file=sys.stderr)
    return 0
