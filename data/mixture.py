"""The stores of every source of a run, all of one tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import sentencepiece

from sieve.data.cache import cache_root, locked, staged
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.phases import ONLY, phases_of
from sieve.data.prepare import build_stores, disjoint, text_passes
from sieve.data.sources import source_of
from sieve.data.tokenizer import Tokenizer, train
from sieve.data.tokens import Tokens

logger = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """What a run reads its tokens from, by source."""

    tokenizer: Tokenizer
    train: dict[str, Tokens]
    validation: dict[str, Tokens]


def build_corpus(data: DataConfig, tokenizer: TokenizerConfig) -> Corpus:
    """As `build_stores`, of every source of `data`; a tokenizer that is yet to be trained learns from all of them, from
    each as much as its weight says. Raises ValueError, naming the source, where one cannot be had."""
    if not data.sources:
        stores = build_stores(data, tokenizer)
        return Corpus(stores.tokenizer, {ONLY: stores.train}, {ONLY: stores.validation})
    shared = {key: value for key in ("cache_dir", "threads") if (value := getattr(data, key)) is not None}
    configs = {
        name: source.model_copy(update={"name": f"{data.name}/{name}", **{
            key: value for key, value in shared.items() if getattr(source, key) is None
        }})
        for name, source in data.sources.items()
    }
    _held_out_of_all(configs)
    if tokenizer.path is None and not any(config.type == "shards" for config in configs.values()):
        tokenizer = _trained(data, configs, tokenizer)
    found = {}
    for name, config in configs.items():
        with _named(name):
            found[name] = build_stores(config, tokenizer)
    first, *others = found
    for name in others:
        if found[name].tokenizer.hash != found[first].tokenizer.hash:
            raise ValueError(
                f"data.sources.{name} has tokens of another tokenizer ({found[name].tokenizer.hash}) than data.sources."
                f"{first} ({found[first].tokenizer.hash}); prepare both with one, and give it as tokenizer.path"
            )
    return Corpus(
        found[first].tokenizer,
        {name: stores.train for name, stores in found.items()},
        {name: stores.validation for name, stores in found.items()},
    )


def _held_out_of_all(configs: Mapping[str, DataConfig]) -> None:
    """ValueError where a source is validated on files that another one trains on; `text_passes` looks at each alone."""
    held_out = {}
    for name, config in configs.items():
        if config.validation_paths or config.validation_split:
            with _named(name):
                held_out[name] = source_of(config, validation=True)
    for name, config in configs.items() if held_out else ():
        if config.type != "shards":
            with _named(name):
                source = source_of(config)
            for other, validation in held_out.items():
                disjoint(source, validation, f"data.sources.{name}", f"data.sources.{other}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says of which source an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.sources.{name}: {error}") from error


def _trained(data: DataConfig, configs: Mapping[str, DataConfig], config: TokenizerConfig) -> TokenizerConfig:
    """`config` with the path of a tokenizer that was trained on samples of the training text of all sources: of each a
    part of sample_bytes, by its mean weight over the phases. Trained once, then found in the cache."""
    phases = phases_of(data, seq_len=1, global_batch=1, micro_batch=1)
    shares = {name: sum(p.weights[name] / sum(p.weights.values()) for p in phases) / len(phases) for name in configs}
    digest = hashlib.blake2b(digest_size=10)
    texts = []
    for name, source_config in configs.items():
        with _named(name):
            for text in _sample(source_config, round(shares[name] * config.sample_bytes)):
                digest.update(len(text).to_bytes(8, "little") + text.encode())
                texts.append(text)
    digest.update((config.model_dump_json(exclude={"name", "path"}) + sentencepiece.__version__).encode())
    target = cache_root(data.cache_dir) / "tokenizers" / f"mixture-{digest.hexdigest()}"
    with locked(target):
        if not target.exists():
            logger.info("training a tokenizer of %d pieces on %d texts of %s", config.vocab_size, len(texts), data.name)
            trained = train(texts, config)
            with staged(target) as folder:
                (folder / "tokenizer.model").write_bytes(trained.model)
    return config.model_copy(update={"path": str(target / "tokenizer.model")})


def _sample(config: DataConfig, max_bytes: int) -> Iterator[str]:
    """Training text of one source."""
    if not max_bytes:
        return
    source, split = text_passes(config)[0]
    for document in source.sample(max_bytes):
        yield from (text for part, text in split.parts(document) if part == "train")
