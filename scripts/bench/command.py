"""`sieve bench`: which benchmark; each is a module with a `main` of its own, imported when it is called for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "attention": ("sieve.scripts.bench_attention", "the attention kernels beside full attention, on a GPU"),
    "training": ("sieve.scripts.bench_training", "whole training steps, full attention and NSA, by length"),
    "data": ("sieve.scripts.bench_data", "reading tokens beside a plain numpy loop and beside streaming text"),
    "decode": ("sieve.scripts.bench_decode", "one token over a cache, NSA beside full attention, on a GPU"),
    "moe": ("sieve.scripts.bench_moe", "the experts' products and whole layer beside a dense one, on a GPU"),
    "prepare": ("sieve.scripts.bench_prepare", "sieve prepare beside the tokenizer alone"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sieve bench NAME ...`; 2 for a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or [""]
    if name in BENCHMARKS:
        return importlib.import_module(BENCHMARKS[name][0]).main(rest)
    lines = ["usage: sieve bench NAME [ARGUMENT ...]", ""]
    lines += [f"  {name:10} {about}" for name, (_, about) in BENCHMARKS.items()]
    asked = name in ("-h", "--help")
    print("\n".join([*lines, "", "sieve bench NAME --help says more."]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
