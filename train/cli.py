"""The `sieve` command: finds the module of a sub-command and hands the arguments on."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from sieve.data.disk import is_refusal, told

COMMANDS = {
    "train": ("sieve.train.run", "pretrain a model"),
    "twin": ("sieve.train.twin", "train with full attention, then with NSA, and compare"),
    "compare": ("sieve.train.compare", "compare two runs: table, plot, HTML report"),
    "generate": ("sieve.train.generate", "continue a text with a trained model"),
    "eval": ("sieve.train.evaluate", "measure a trained model: loss, needle, recall, NSA's health, lm-eval"),
    "tokenizer": ("sieve.scripts.train_tokenizer", "train a tokenizer, measure it, export it to transformers"),
    "prepare": ("sieve.scripts.prepare_data", "tokenize text into shards to train from"),
    "plan": ("sieve.scripts.plan", "parameters, FLOPs, memory and speed of a run, on paper and measured"),
    "export": ("sieve.train.export", "write a checkpoint's weights in transformers' layout"),
    "bench": ("sieve.scripts.bench.command", "measure attention kernels, training steps, reading or preparing data"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sieve COMMAND ...` with the arguments after the program's name; returns the exit code, 2 for a mistake.

    A command is a module with a `main(arguments) -> int`; it is imported when it is called for and not before. A full disk or
    a file that may not be used ends any of them here, in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = {name: entry for name, entry in COMMANDS.items() if _exists(entry[0])}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(known), end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in known:
        near = difflib.get_close_matches(command, known, n=1)
        hint = f"did you mean sieve {near[0]}?" if near else f"there are {', '.join(known)}"
        if "=" in command or command.startswith("--cfg"):
            hint = f"overrides follow a command: sieve train {' '.join(arguments)}"
        print(f"sieve: {command} is no command; {hint}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(known[command][0]).main(rest)
    except OSError as error:
        if not is_refusal(error):
            raise
        print(f"sieve {command}: {told(error)}", file=sys.stderr)
        return 2


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its folder is not there
        return False


def _usage(known: dict[str, tuple[str, str]]) -> str:
    lines = ["usage: sieve COMMAND [ARGUMENT ...]", ""]
    lines += [f"  {name:9} {about}" for name, (_, about) in known.items()]
    lines += ["", "sieve COMMAND --help says more."]
    return "\n".join(lines) + "\n"
