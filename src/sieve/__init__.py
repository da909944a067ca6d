"""Sieve: pretraining of long-context language models with Native Sparse Attention."""

from pathlib import Path

_link = Path(__file__).with_name("train")
if _link.is_symlink():  # a checkout: show files and breakpoints under ./train, not ./src/sieve/train
    __path__ = [str(_link.resolve().parent)]
