"""Texts to ids in several processes, in order: what comes out does not depend on how many there are."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from sieve.data.shard_files import dtype_of
from sieve.data.tokenizer import Encoder, as_documents
from sieve.data.tokenizer_export import described, encoder_of

AHEAD = 3  # batches under way for each process: one encoded, one waiting, one being sent
_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)

T = TypeVar("T")
_encoder: Encoder  # of a worker process, set once when it starts


class EncodePool:
    """A context that encodes batches in `processes` processes; in this one if that is 1."""

    def __init__(self, encoder: Encoder, processes: int):
        self._encoder, self._processes = encoder, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> EncodePool:
        if self._processes > 1:
            # Spawned, for a forked child would inherit the threads' locks of the network and of the progress bar.
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start,
                initargs=(self._encoder.model, described(self._encoder), os.getpid()),
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error[0] is None, cancel_futures=True)

    def encode(self, batches: Iterator[tuple[T, list[str], list[str]]]) -> Iterator[tuple[T, list[np.ndarray]]]:
        """(tag, names, texts) to (tag, documents): ids with bos and eos, in the smallest type, in the order of texts.

        names: of the texts, for messages. ValueError, naming the document, if one cannot be encoded.
        """
        if self._pool is None:
            for tag, names, texts in batches:
                yield tag, _taken(_encode(self._encoder, texts), names)
            return
        pending: deque[tuple[T, list[str], Future[Any]]] = deque()
        for tag, names, texts in batches:
            pending.append((tag, names, self._submit(texts)))
            if len(pending) >= AHEAD * self._processes:
                yield _first(pending)
        while pending:
            yield _first(pending)

    def _submit(self, texts: list[str]) -> Future[Any]:
        try:
            return self._pool.submit(_encode_here, texts)
        except BrokenProcessPool as error:
            raise ValueError(_DIED) from error


_DIED = (
    "a tokenizing process was killed, most likely for want of memory; what is written so far is kept: the same command "
    "goes on, with fewer workers= if need be"
)


def _first(pending: deque[tuple[T, list[str], Future[Any]]]) -> tuple[T, list[np.ndarray]]:
    tag, names, future = pending.popleft()
    try:
        return tag, _taken(future.result(), names)
    except BrokenProcessPool as error:
        raise ValueError(_DIED) from error


def _taken(result: tuple[np.ndarray, list[int]] | tuple[int, str], names: Sequence[str]) -> list[np.ndarray]:
    found, rest = result
    if isinstance(found, int):
        raise ValueError(f"{names[found]} cannot be tokenized: {rest}")
    return np.split(found, np.cumsum(rest)[:-1]) if rest else []


def _start(model: bytes, about: dict[str, Any], parent: int) -> None:
    """In a new process: load the tokenizer; end with the parent, even if it is killed, and leave Ctrl-C to it."""
    global _encoder
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but not SIGTERM, by which a broken pool ends those that are left
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = encoder_of(model, about)


def _encode_here(texts: list[str]) -> tuple[np.ndarray, list[int]] | tuple[int, str]:
    return _encode(_encoder, texts)


def _encode(encoder: Encoder, texts: list[str]) -> tuple[np.ndarray, list[int]] | tuple[int, str]:
    """All ids end to end, and the documents' lengths; or the place of the text that fails, and how."""
    try:
        documents = as_documents(encoder, texts)
    except Exception:  # of whatever kind a tokenizer raises: find the text, or let it through
        for i, text in enumerate(texts):
            try:
                encoder.encode([text])
            except Exception as error:
                return i, f"{type(error).__name__}: {error}"
        raise
    flat = np.concatenate(documents) if documents else np.zeros(0, np.int32)
    return flat.astype(dtype_of(encoder.vocab_size)), [len(ids) for ids in documents]
