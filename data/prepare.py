"""From settings to token stores: trains the tokenizer and tokenises at first use, and finds both again later."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from sieve.data.cache import cache_root, locked, staged
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.document import Source, in_words
from sieve.data.progress import Progress
from sieve.data.shards import ShardedStore, open_shards
from sieve.data.sources import FileSource, source_of
from sieve.data.split import Split
from sieve.data.store import FORMAT, StoreWriter, TokenStore
from sieve.data.tokenizer import Encoder, Tokenizer, as_documents, train
from sieve.data.tokenizer_export import given_tokenizer

logger = logging.getLogger(__name__)

BUFFER_CHARS = 1 << 20  # text held between reading and encoding, beside the document being read
MAX_THREADS = 16


class Stores(NamedTuple):
    """What a run reads its tokens from."""

    tokenizer: Encoder
    train: TokenStore | ShardedStore
    validation: TokenStore | ShardedStore


def build_stores(data: DataConfig, tokenizer: TokenizerConfig) -> Stores:
    """The tokenizer and the two token stores of these settings, built if the cache has them not.

    Any number of processes may call this at once: one builds, the others wait and open. A build that is killed leaves
    nothing that is taken for whole. Raises ValueError where settings name nothing usable, with what is there instead.
    """
    if data.type == "shards":
        return Stores(*open_shards(data, tokenizer))
    root = cache_root(data.cache_dir)
    passes = text_passes(data)
    trained = make_tokenizer(root, *passes[0], tokenizer)
    if len(passes) == 1:
        return Stores(trained, *_stores(root, *passes[0], trained, ("train", "validation"), data))
    return Stores(trained, *(_stores(root, s, split, trained, (split.part,), data)[0] for s, split in passes))


def text_passes(data: DataConfig) -> list[tuple[Source, Split]]:
    """What is to be read, and how each document of it is used: one source that is split, or one for training and one
    for validation. ValueError where settings name nothing usable, with what is there instead."""
    source = source_of(data)
    if not (data.validation_paths or data.validation_split):
        return [(source, Split.of(source, data.validation_fraction))]
    held_out = source_of(data, validation=True)
    disjoint(source, held_out)
    return [(source, Split(None)), (held_out, Split(None, "validation"))]


def make_tokenizer(root: Path, source: Source, split: Split, config: TokenizerConfig) -> Encoder:
    """The tokenizer that `config` names, or one trained on a sample of the source's training text, kept in `root`."""
    given = given_tokenizer(config)
    if given is not None:
        return given
    parts = [part for document in source.sample(config.sample_bytes) for part in split.parts(document)]
    texts = [text for part, text in parts if part == "train"]
    if not texts:
        skipped = source.skipped()
        if next(iter(source), None) is not None:
            raise ValueError(
                f"tokenizer.sample_bytes={config.sample_bytes}: so little of {in_words(source)} has no training text; raise it"
            )
        raise ValueError(f"no text to train a tokenizer on in {in_words(source)}: {skipped} were left out")
    settings = config.model_dump_json(exclude={"name", "path"})
    target = root / "tokenizers" / _key(settings, sentencepiece.__version__, *texts)
    model = target / "tokenizer.model"
    with locked(target):
        if not model.exists():
            start, size = time.monotonic(), sum(map(len, texts))
            logger.info("training a tokenizer of %d pieces on %.1f M characters", config.vocab_size, size / 1e6)
            trained = train(texts, config)
            with staged(target) as folder:
                (folder / model.name).write_bytes(trained.model)
                (folder / "config.json").write_text(settings + "\n")
            logger.info("trained the tokenizer in %.1f s: %s", time.monotonic() - start, model)
    return Tokenizer.load(model)


def _stores(
    root: Path, source: Source, split: Split, tokenizer: Encoder, parts: tuple[str, ...], data: DataConfig
) -> list[TokenStore]:
    """The stores of `parts`, opened, or made in one pass over the source."""
    key = _key(str(FORMAT), source.fingerprint(), repr(split), tokenizer.hash)
    targets = {part: root / "tokens" / f"{key}-{part}" for part in parts}
    with locked(root / "tokens" / key):
        stores = [_opened(target) for target in targets.values()]
        if None in stores:
            with ExitStack() as stack:
                folders = {part: stack.enter_context(staged(target)) for part, target in targets.items()}
                _tokenize(source, split, tokenizer, folders, data)
            stores = [TokenStore(target) for target in targets.values()]
    return stores


def _opened(target: Path) -> TokenStore | None:
    """The store in `target`, or None if there is none; a damaged one is removed, to be built again."""
    if not target.exists():
        return None
    try:
        return TokenStore(target)
    except ValueError as error:
        logger.warning("building anew, because %s", error)
        shutil.rmtree(target)
        return None


def _tokenize(
    source: Source, split: Split, tokenizer: Encoder, folders: dict[str, Path], data: DataConfig
) -> None:
    threads = data.threads or min(len(os.sched_getaffinity(0)), MAX_THREADS)
    with ExitStack() as stack:
        writers = {part: StoreWriter(folder, tokenizer.vocab_size) for part, folder in folders.items()}
        for writer in writers.values():
            stack.callback(writer.close)
        bar = stack.enter_context(Progress(f"tokenising {data.name} ({', '.join(folders)})"))
        buffer: list[tuple[str, str]] = []
        held = 0
        for document in source:
            for part, text in split.parts(document):
                buffer.append((part, text))
                held += len(text)
            if held >= BUFFER_CHARS:
                _flush(buffer, tokenizer, writers, threads)
                held = 0
                counts = [(w.num_documents, w.num_tokens) for w in writers.values()]
                bar.update(source.done, *map(sum, zip(*counts)))
        _flush(buffer, tokenizer, writers, threads)
        bar.update(1.0, *map(sum, zip(*[(w.num_documents, w.num_tokens) for w in writers.values()])))
        for part, writer in writers.items():
            if not writer.num_documents:
                raise split.nothing_for(part, source, source.skipped())
            writer.finish(
                part=part, name=data.name, tokenizer=tokenizer.hash, source=source.description,
                skipped=source.skipped(),
            )
    logger.info("%s: %s were left out", data.name, source.skipped())


def _flush(
    buffer: list[tuple[str, str]], tokenizer: Encoder, writers: dict[str, StoreWriter], threads: int
) -> None:
    """Encode the buffered (part, text) and give them to their writers; empties the buffer."""
    documents = as_documents(tokenizer, [text for _, text in buffer], threads)
    for part, writer in writers.items():
        writer.add([ids for (p, _), ids in zip(buffer, documents) if p == part])
    buffer.clear()


def disjoint(source: Source, held_out: Source, where: str = "data", where_held_out: str = "data") -> None:
    """ValueError where files of `source`, for training, are among those for validation; where: what their settings stand in."""
    if isinstance(source, FileSource) and isinstance(held_out, FileSource):
        shared = {file.key for file in source.files} & {file.key for file in held_out.files}
        if shared:
            keys = held_out.key.replace("data", where_held_out, 1), source.key.replace("data", where, 1)
            raise ValueError(
                f"{' and '.join(keys)} share {len(shared)} files, as {min(shared)}; a model is not validated on its own "
                "training text: take them out of one"
            )


def _key(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=10)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
