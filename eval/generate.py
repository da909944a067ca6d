"""Text from a decoder with its cache: a batch of prompts of any lengths, token by token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch

from sieve.eval.config import Sampling
from sieve.eval.sampling import Sampler
from sieve.model.decoder import Decoder
from sieve.model.step import Step, why_not_graph


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, *, stop_ids: Sequence[int] = (),
    prefill: int | None = None, graph: bool | None = None,
) -> Iterator[dict[int, int]]:
    """Yields {row: token} of every text that still goes on, step by step; send() a set of rows to end those too.

    A text ends after one of stop_ids or max_tokens; finished ones leave the batch. prefill: prompt tokens a sequence
    taken in at a time, which bounds memory (None: all). graph: replay steps from a CUDA graph, captured anew when texts
    end (None: where that can be; see sieve.model.step). Raises ValueError for an empty prompt, for a graph that cannot be had,
    and where the cache, which has room for max_tokens from the start, does not fit into free memory.
    """
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty or not prompts:
        raise ValueError(f"prompts {empty} have no token; begin them with bos" if empty else "no prompt is given")
    training = model.training
    model.eval()
    try:
        yield from _generate(model, prompts, sampling, frozenset(stop_ids), prefill, graph)
    finally:
        model.train(training)


def _generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: frozenset[int], prefill: int | None,
    graph: bool | None,
) -> Iterator[dict[int, int]]:
    device = model.embed.weight.device
    check_fits(model, len(prompts), max(map(len, prompts)), sampling.max_tokens)
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + sampling.max_tokens)
    logits = None
    step = prefill or max(map(len, prompts))
    for start in range(0, max(map(len, prompts)), step):
        parts = [prompt[start : start + step] for prompt in prompts]
        new = torch.tensor([token for part in parts for token in part], dtype=torch.int64, device=device)
        counts = [len(part) for part in parts]
        found = model.extend(new, counts, cache)
        took = torch.tensor(counts, device=device)[:, None] > 0
        logits = found if logits is None else torch.where(took, found, logits)
    samplers = [Sampler(sampling, row) for row in range(len(prompts))]
    rows = list(range(len(prompts)))
    graph = why_not_graph(model, cache) is None if graph is None else graph
    next_logits = Step(model, cache, graph=graph)
    for count in range(1, sampling.max_tokens + 1):
        tokens = {row: samplers[row](own) for row, own in zip(rows, logits)}
        ended = (yield tokens) or set()
        going = [i for i, row in enumerate(rows) if tokens[row] not in stop_ids and row not in ended]
        if not going or count == sampling.max_tokens:
            return
        if len(going) < len(rows):
            cache.select(going)
            rows = [rows[i] for i in going]
            next_logits = Step(model, cache, graph=graph)
        new = torch.tensor([tokens[row] for row in rows], dtype=torch.int64, device=device)
        logits = next_logits(new)


def check_fits(model: Decoder, texts: int, longest: int, max_tokens: int) -> None:
    """ValueError where the cache of `texts` texts of up to longest + max_tokens tokens is more than the free memory."""
    needed, free = model.cache_bytes(texts, longest + max_tokens), free_bytes(model.embed.weight.device)
    if needed > free:
        raise ValueError(
            f"max_tokens={max_tokens} for {texts} texts with prompts of up to {longest} tokens needs a cache of "
            f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of memory are free; lower max_tokens, or take fewer texts at once"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on `device` now."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, for its next tensors
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # sysconf's free pages leave out those that hold files and can be had all the same
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def complete(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, *, stop_ids: Sequence[int] = (),
    prefill: int | None = None, graph: bool | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, a stop id included; arguments as generate's."""
    found: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(model, prompts, sampling, stop_ids=stop_ids, prefill=prefill, graph=graph):
        for row, token in tokens.items():
            found[row].append(token)
    return found


class TextStream:
    """Tokens of one text to characters, as early as they are certain: what may be half a character or the beginning of
    a stop string is held back. The text ends before the first stop string; `stopped` says that one came."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("stop='' is in every text; give at least one character")
        self._decode, self._stop, self.stopped = decode, tuple(stop), False
        self._before: list[int] = []  # context, since some tokenizers drop a space at the beginning
        self._pending: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """The characters that are certain now."""
        if self.stopped:
            return ""
        self._pending.append(token)
        new = self._decode(self._before + self._pending)[len(self._decode(self._before)) :]
        if new.endswith("\ufffd") and len(self._pending) < 4:  # at most four bytes a character
            return ""
        self._before, self._pending = self._pending, []
        return self._release(new, last=False)

    def finish(self) -> str:
        """What was held back and came to nothing."""
        if self.stopped:
            return ""
        new = self._decode(self._before + self._pending)[len(self._decode(self._before)) :] if self._pending else ""
        self._pending = []
        return self._release(new, last=True)

    def _release(self, new: str, *, last: bool) -> str:
        text = self._held + new
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def generate_text(
    model: Decoder, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str], prompts: Sequence[str],
    sampling: Sampling, *, stop: Sequence[str] = (), stop_ids: Sequence[int] = (), prefill: int | None = None,
    show: Callable[[int, str], None] = lambda row, piece: None,
) -> list[str]:
    """The continuation of each prompt, without stop ids and stop strings; show(row, piece) gets it as it comes.

    encode: a prompt to ids, its bos included; decode: ids to text.
    """
    streams = [TextStream(decode, stop) for _ in prompts]
    texts = ["" for _ in prompts]

    def out(row: int, piece: str) -> None:
        if piece:
            texts[row] += piece
            show(row, piece)

    ids = [encode(prompt) for prompt in prompts]
    steps = generate(model, ids, sampling, stop_ids=stop_ids, prefill=prefill)
    ended: set[int] | None = None
    try:
        while True:
            tokens = steps.send(ended)
            for row, token in tokens.items():
                if token not in stop_ids:
                    out(row, streams[row].push(token))
            ended = {row for row in tokens if streams[row].stopped}
    except StopIteration:
        pass
    for row, stream in enumerate(streams):
        out(row, stream.finish())
    return texts
