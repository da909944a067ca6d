"""The work of `sieve prepare`: any source of text to a folder of shards, going on where it was stopped or killed."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sieve.data.cache import cache_root, staged
from sieve.data.config import DataConfig, TokenizerConfig
from sieve.data.disk import told
from sieve.data.document import Source
from sieve.data.encode_pool import EncodePool
from sieve.data.prepare import make_tokenizer, text_passes
from sieve.data.progress import Progress
from sieve.data.shard_files import FORMAT, JOURNAL, MANIFEST, TOKENIZER, write_json
from sieve.data.shard_writer import ShardWriter
from sieve.data.split import Split
from sieve.data.tokenizer import Encoder
from sieve.data.tokenizer_export import described, save

logger = logging.getLogger(__name__)

BATCH_CHARS = 1 << 20  # what a process is given at once
PARTS = ("train", "validation")
PLACES = {"first", "roots"}  # of a source's description: where it lies, which may change


@dataclass(frozen=True)
class Outcome:
    """finished: whether all is written; manifest: of the finished folder, else what there is so far. seconds and tokens
    are of this start alone."""

    finished: bool
    manifest: dict[str, Any]
    seconds: float
    tokens: int


def prepare_shards(
    data: DataConfig, tokenizer: TokenizerConfig, out: Path, *, shard_tokens: int, processes: int, save_every: float,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Tokenize what `data` names into shards under `out`; see sieve.data.shard_files.

    shard_tokens: a shard ends with the document that reaches it. save_every: seconds from one journal to the next,
    the most that a kill costs. stop: asked between batches; True ends the work after saving it. The files depend on
    text, tokenizer and shard_tokens alone: not on processes, stops or kills. Raises ValueError for bad settings, for an
    `out` that holds something else or is in use, and for what goes wrong on the way; what is saved stays.
    """
    with _alone(out):
        passes = text_passes(data)
        encoder = make_tokenizer(cache_root(data.cache_dir), *passes[0], tokenizer)
        settings = {
            "format": FORMAT, "source": [source.fingerprint() for source, _ in passes],
            "split": [asdict(split) for _, split in passes], "tokenizer": described(encoder),
            "shard_tokens": shard_tokens,
        }
        journal = _journal(out, settings, [source.description for source, _ in passes])
        if journal is None:
            (out / JOURNAL).unlink(missing_ok=True)
            return Outcome(True, json.loads((out / MANIFEST).read_text()), 0.0, 0)
        for left_over in out.glob(f"{TOKENIZER}.tmp-*"):
            shutil.rmtree(left_over)
        try:
            write_json(out / JOURNAL, journal)  # from here on the folder belongs to these settings
            if not (out / TOKENIZER).exists():
                with staged(out / TOKENIZER) as folder:
                    save(encoder, folder)
            return _Job(data.name, passes, encoder, out, journal, shard_tokens).run(processes, save_every, stop)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise
            if error.filename is None:
                error.filename = str(out)
            raise ValueError(f"{told(error)}; what is saved stays: make room, and the same command goes on") from error


class _Job:
    def __init__(
        self, name: str, passes: list[tuple[Source, Split]], encoder: Encoder, out: Path, journal: dict[str, Any],
        shard_tokens: int,
    ):
        self._name, self._passes, self._encoder, self._out = name, passes, encoder, out
        self._settings: dict[str, Any] = journal["settings"]
        self._sources = [source.description for source, _ in passes]
        self._place: tuple[int, dict[str, int]] = (journal["pass"], journal["cursor"])
        self._skipped: list[str] = journal["skipped"]
        self._writers = {
            part: ShardWriter(out / part, encoder.vocab_size, shard_tokens, journal["parts"].get(part)) for part in PARTS
        }
        self._before = self._counts()

    def run(self, processes: int, save_every: float, stop: Callable[[], bool]) -> Outcome:
        start = saved = time.monotonic()
        if self._before[1]:
            logger.info("going on with %s behind %d documents, %d tokens", self._out, *self._before)
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.callback(writer.close)
            bar = stack.enter_context(Progress(f"preparing {self._name}", before=self._before[1]))
            pool = stack.enter_context(EncodePool(self._encoder, processes))
            encoded = pool.encode(self._batches())
            while not stop():
                try:
                    batch = next(encoded, None)
                except ValueError:
                    if stop():  # a SIGTERM to the whole group ends the tokenizing processes too
                        break
                    self._save()
                    raise
                if batch is None:
                    return self._finish(time.monotonic() - start)
                (place, done, skipped, parts), documents = batch
                for part, writer in self._writers.items():
                    writer.add([ids for p, ids in zip(parts, documents) if p == part])
                self._place, self._skipped = place, skipped
                bar.update(done, *self._counts())
                if time.monotonic() - saved >= save_every:
                    self._save()
                    saved = time.monotonic()
            self._save()
            so_far = {"parts": {p: {"documents": w.num_documents, "tokens": w.num_tokens}
                                for p, w in self._writers.items()}}
            return Outcome(False, so_far, time.monotonic() - start, self._counts()[1] - self._before[1])

    def _batches(self) -> Iterator[tuple[Any, list[str], list[str]]]:
        """((place behind it, share done, skipped so far, parts), names, texts), about BATCH_CHARS of text each."""
        first, cursor = self._place
        skipped = list(self._skipped)
        for number in range(first, len(self._passes)):
            source, split = self._passes[number]
            parts, names, texts, held = [], [], [], 0
            for document in source.after(cursor if number == first else {}):
                for part, text in split.parts(document):
                    parts.append(part)
                    names.append(document.id)
                    texts.append(text)
                    held += len(text)
                if held >= BATCH_CHARS:
                    yield ((number, source.cursor), self._done(number, source.done), skipped, parts), names, texts
                    parts, names, texts, held = [], [], [], 0
            skipped = [*skipped, source.skipped()]
            yield ((number + 1, {}), self._done(number, 1.0), skipped, parts), names, texts

    def _done(self, number: int, of_it: float) -> float:
        """Share of the work when `of_it` of pass `number` is over, by the bytes that each source says it has."""
        sizes = [max(source.description.get("bytes", 0), 1) for source, _ in self._passes]
        return (sum(sizes[:number]) + of_it * sizes[number]) / sum(sizes)

    def _save(self) -> None:
        for writer in self._writers.values():
            writer.sync()
        number, cursor = self._place
        write_json(self._out / JOURNAL, {
            "settings": self._settings, "sources": self._sources, "pass": number, "cursor": cursor, "skipped": self._skipped,
            "parts": {part: writer.state for part, writer in self._writers.items()},
        })

    def _finish(self, seconds: float) -> Outcome:
        self._save()
        empty = [part for part, writer in self._writers.items() if not writer.num_documents]
        if empty:
            source, split = self._passes[0 if empty[0] == "train" else -1]
            raise split.nothing_for(empty[0], source, ", ".join(self._skipped))
        tokens = self._counts()[1] - self._before[1]
        manifest = {
            "format": FORMAT, "name": self._name, "tokenizer": self._settings["tokenizer"],
            "dtype": "uint16" if self._encoder.vocab_size <= 65536 else "uint32",
            "parts": {part: writer.finish() for part, writer in self._writers.items()},
            "sources": self._sources, "skipped": self._skipped,
            "settings": self._settings,
        }
        write_json(self._out / MANIFEST, manifest)
        (self._out / JOURNAL).unlink()
        return Outcome(True, manifest, seconds, tokens)

    def _counts(self) -> tuple[int, int]:
        writers = self._writers.values()
        return sum(w.num_documents for w in writers), sum(w.num_tokens for w in writers)


def _journal(out: Path, settings: dict[str, Any], sources: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where to go on in `out`; None if it is finished. ValueError if it was begun with other settings. sources: what the
    sources say of themselves, for that message."""
    for name in (MANIFEST, JOURNAL):
        try:
            found = json.loads((out / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f"{out / name} cannot be read ({error}); remove {out} and prepare anew") from error
        was = found.get("settings", {})
        changed = [key for key in settings if was.get(key) != settings[key]]
        if changed:
            told = ", ".join(
                _other_source(found.get("sources", []), sources) if key == "source"
                else f"{key} {was.get(key)} instead of {settings[key]}" for key in changed
            )
            raise ValueError(f"{out} was made with other settings: {told}; give another out=, or remove the folder")
        return None if name == MANIFEST else found
    others = sorted(path.name for path in out.iterdir() if path.name != f".{JOURNAL}.tmp")
    if others:
        raise ValueError(f"{out} holds other files, as {others[0]}; give another out=")
    return {"settings": settings, "sources": sources, "pass": 0, "cursor": {}, "skipped": [], "parts": {}}


def _other_source(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """What of a source is another, where its fingerprint is; was: empty in the journals of older versions."""
    if not was:
        return "source (its text, or data.text_field, data.min_bytes, data.max_bytes or data.max_document_bytes)"
    told = [
        f"{'data.' * (key in DataConfig.model_fields)}{key} {old[key]} instead of {new[key]}"
        for old, new in zip(was, now) for key in old.keys() & new.keys() - PLACES if old[key] != new[key]
    ]
    return f"source ({', '.join(sorted(set(told))) or 'its text'})"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Held while `out` is written: two at once would mix their files. The system frees it with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.with_name(f".{out.name}.lock"))
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out} is being prepared by another process; wait for it, or give another out=") from error
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}); give another") from error
    try:
        yield
    finally:
        lock.release()
