"""A suite of tasks on one model: each task's rows, its metrics, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, get_args

import numpy as np
import torch

from sieve.eval.check import check_suite
from sieve.eval.config import NEEDLES, NSA_TASKS, NeedleConfig, RecallConfig, SuiteConfig, SyntheticTask
from sieve.eval.documents import Documents, document_loss, token_loss_of
from sieve.eval.examples import Example, Predictor, forward_of, predictor, score
from sieve.eval.health import probe, switch_losses
from sieve.eval.load import Loaded, Text
from sieve.eval.needle import haystack, needle
from sieve.eval.recall import GENERATORS, chance
from sieve.model.decoder import Decoder

SYNTHETIC = get_args(SyntheticTask)
# Draws a bar: bar(label, total) is a context that gives advance(n).
Bar = Callable[[str, float | None], Any]


@dataclass(frozen=True)
class Result:
    """Of a task. tables: rows by the table's name. metrics: single numbers by name (as under eval/ in training).
    chance: accuracy of a guess, where there is one. seconds: it took. note: for the reader."""

    task: str
    tables: dict[str, list[dict[str, Any]]]
    metrics: dict[str, float]
    chance: float | None = None
    seconds: float = 0.0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@contextmanager
def no_bar(label: str, total: float | None) -> Iterator[Callable[[int], None]]:
    yield lambda n: None


def alphabet_of(text: Text | None, vocab_size: int) -> list[int]:
    """The ids that stand for text, of which the recall tasks draw."""
    if text is not None and text.bytes_of is not None:
        return [i for i, size in enumerate(text.bytes_of.tolist()) if size]
    special = {text.bos_id, text.eos_id} if text is not None else set()
    return [i for i in range(vocab_size) if i not in special]


def synthetic(
    task: str, predict: Predictor, text: Text | None, alphabet: Sequence[int], needles: NeedleConfig,
    recall: RecallConfig, seed: int, batch_tokens: int, bar: Bar = no_bar, hay: Sequence[int] | None = None,
) -> Result:
    """needle, multikey, passkey, mqar, copy or induction. hay: real tokens to hide the needle in, instead of the passkey
    paper's sentences. ValueError when a needle is asked for without a tokenizer."""
    bos = [] if text is None or text.bos_id is None else [text.bos_id]
    if task in NEEDLES:
        if text is None:
            raise ValueError(f"{task} needs the model's tokenizer")
        examples: list[Example] = list(needle(
            needles, text.encode, bos, seed, kind=task, fill=None if hay is None else haystack(text.encode, hay)
        ))
        key, guess = "length", None
    else:
        examples = list(GENERATORS[task](recall, alphabet, bos, seed))
        key, guess = ("pairs" if task == "mqar" else "length"), chance(task, alphabet)
    with bar(task, len(examples)) as advance:
        rows = score(predict, examples, batch_tokens, advance)
    metrics = {f"eval/{task}": _mean(rows), f"eval/{task}_loss": _mean(rows, "loss")}
    for size in dict.fromkeys(row[key] for row in rows):
        short = "pairs" if key == "pairs" else "len"
        metrics[f"eval/{task}_{short}_{size:04d}"] = _mean(row for row in rows if row[key] == size)
    return Result(task, {task: rows}, metrics, guess)


def _mean(rows: Iterable[dict[str, Any]], number: str = "accuracy") -> float:
    """Of rows, each weighed by its answers."""
    total, count = 0.0, 0
    for row in rows:
        total, count = total + row[number] * row["answers"], count + row["answers"]
    return total / count


def run_suite(
    model: Loaded, config: SuiteConfig, sources: Mapping[str, Documents],
    bar: Bar = no_bar, report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The tasks in order, each told to `report` as soon as it is there. sources: held-out documents by their source, each
    of which gives as many tokens; empty where there are none. ValueError for a task that this model or these documents do
    not allow, before the first of them."""
    decoder, text, device = model.decoder, model.text, model.decoder.embed.weight.device
    predict = predictor(forward_of(decoder), device)
    alphabet = alphabet_of(text, decoder.vocab_size)
    seq_len = config.loss.seq_len or model.seq_len or 4096
    bytes_of = text.bytes_of if text is not None and text.bytes_of is not None else torch.zeros(decoder.vocab_size).long()
    bytes_of = bytes_of.to(device)
    check_suite(model, config, sources, alphabet)
    probed = [task for task in config.suite if task in NSA_TASKS]
    probe_texts = _probe_texts(model, probed[0], sources, config.health.tokens, seq_len) if probed else []
    results = []
    for task in config.suite:
        start = time.monotonic()
        if task in SYNTHETIC:
            hay = _hay(sources, config.needle) if sources and task in NEEDLES else None
            result = synthetic(
                task, predict, text, alphabet, config.needle, config.recall, config.seed, config.batch_tokens, bar, hay
            )
        elif task == "harness":
            from sieve.eval.harness import run_harness

            result = run_harness(model, config.harness, config.seed, config.batch_tokens)
        elif task == "loss":
            result = _loss(model, config, sources, bytes_of, seq_len, bar)
        else:
            with bar(task, None):
                tables, extra = _health(decoder, probe_texts) if task == "health" else ({task: switch_losses(
                    decoder, [np.asarray(d) for d in probe_texts], bytes_of, seq_len, config.batch_tokens,
                    config.health.larger_topk,
                )}, {})
            result = Result(task, tables, {}, note=_nothing_to_choose(decoder, probe_texts), extra=extra)
        results.append(Result(**(vars(result) | {"seconds": time.monotonic() - start})))
        report(results[-1])
    return results


def _shares(sources: Mapping[str, Documents], max_tokens: int | None) -> dict[str, Iterable[np.ndarray]]:
    """An equal share of max_tokens, and at least two, from each source."""
    return {name: own(max_tokens and max(2, max_tokens // len(sources))) for name, own in sources.items()}


def _hay(sources: Mapping[str, Documents], config: NeedleConfig) -> list[int]:
    """As much of the documents as the longest text takes, without their bos and eos."""
    parts = _shares(sources, max(config.lengths)).values()
    return [int(i) for document in chain.from_iterable(parts) for i in document[1:-1]]


def _probe_texts(
    model: Loaded, task: str, sources: Mapping[str, Documents], max_tokens: int, seq_len: int
) -> list[list[int]]:
    """Documents in pieces of at most seq_len. ValueError for a model whose NSA is not at work on any of them."""
    documents = chain.from_iterable(_shares(sources, max_tokens).values())
    texts = [d[i : i + seq_len].tolist() for d in documents for i in range(0, len(d), seq_len)]
    longest, dense_len = max(map(len, texts), default=0), model.decoder.attention_config.dense_len
    if longest <= dense_len:
        raise ValueError(
            f"{task}: no text has more than {longest} tokens, and up to attention.dense_len={dense_len} {model.name} attends "
            "fully; raise health.tokens or loss.seq_len, or give longer documents with loss.source"
        )
    return texts


def _loss(
    model: Loaded, config: SuiteConfig, sources: Mapping[str, Documents], bytes_of: torch.Tensor, seq_len: int, bar: Bar
) -> Result:
    with bar("loss", config.loss.max_tokens) as advance:
        found = {
            name: document_loss(token_loss_of(model.decoder), own, bytes_of, seq_len, config.batch_tokens, advance)
            for name, own in _shares(sources, config.loss.max_tokens).items()
        }
    own = {name: by_position.mean() for name, (by_position, _) in found.items()}
    tokens = {name: int(by_position.sums[1].sum()) for name, (by_position, _) in found.items()}
    (by_position, by_length), *others = found.values()
    for part in others:
        by_position.sums += part[0].sums
        by_length.sums += part[1].sums
    has_bytes = bool(by_position.sums[2].any())
    metrics = by_position.metrics() if has_bytes else {"eval/loss": by_position.mean()}
    metrics |= {f"eval/loss_len_{row['from']:04d}": row["loss"] for row in by_length.rows()}
    tables = {"loss by position": by_position.rows(), "loss by document length": by_length.rows()}
    if others:
        metrics |= {f"eval/{name}/loss": loss for name, loss in own.items()}
        tables["loss by source"] = [{"source": name, "tokens": tokens[name], "loss": own[name]} for name in own]
    note = "" if has_bytes else "The tokenizer does not say how many bytes a token stands for: no bits per byte."
    return Result("loss", tables, metrics, note=note)


def _health(decoder: Decoder, texts: list[list[int]]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Tables, and what a Result has beside them."""
    rows = probe(decoder, texts)
    tables = {"health": [{k: v for k, v in row.items() if k != "back"} for row in rows]}
    return tables, {"back": {row["layer"]: row["back"] for row in rows}}


def _nothing_to_choose(decoder: Decoder, texts: list[list[int]]) -> str:
    """A note where every query selects all blocks up to its own, so that nothing about the selection can differ."""
    geometry = decoder.attention_config.geometry()
    reach, longest = geometry.topk * geometry.block_size, max(map(len, texts))
    return "" if longest > reach else (
        "The probe's texts are too short to leave anything to choose: they need more blocks than topk, that is more than "
        f"{reach} tokens, and the longest has {longest}. Raise health.tokens or loss.seq_len, or give longer documents."
    )
