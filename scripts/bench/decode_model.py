"""Tokens per second of a whole model's decoding, random weights, greedy, with and without a CUDA graph; cache bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from sieve.model.decoder import Decoder
from sieve.model.init import initialize
from sieve.model.step import PLAIN_STEPS, Step, why_not_graph
from sieve.train.overrides import load_config

VOCABULARY = 32_000
WARM = PLAIN_STEPS + 2
CHUNK = 4096  # tokens of a prompt


@dataclass(frozen=True)
class Decoding:
    """Of one model, length and batch: tokens a second of all sequences, by how steps run; bytes of the cache, and those
    by the formula; why there is no graph, if there is none."""

    tokens_per_second: dict[str, float]
    cache_bytes: int
    formula_bytes: int
    no_graph: str | None


def build(name: str, attention: str, device: str, dtype: torch.dtype, overrides: tuple[str, ...] = ()) -> Decoder:
    """The shipped model config `name` with that attention."""
    config = load_config([f"model={name}", f"attention={attention}", *overrides])
    with torch.device(device):
        decoder = Decoder(config.model, config.attention, VOCABULARY, config.loss)
    initialize(decoder, 0)
    return decoder.to(dtype).eval().requires_grad_(False)


def formula_bytes(decoder: Decoder, batch: int, capacity: int) -> int:
    """What docs/evaluation.md says the cache takes, without room to spare."""
    model, attention = decoder.config, decoder.attention_config
    g, total = attention.geometry(), 0
    for kind in attention.layer_types(model.num_layers):
        sizes = {"full": capacity, "window": g.window_size}
        total += sizes.get(kind, capacity + capacity // g.kernel_stride + g.kernel_size + g.window_size)
    itemsize = decoder.embed.weight.element_size()
    return total * batch * model.num_kv_heads * (model.head_dim_qk + model.head_dim_v) * itemsize


@torch.no_grad()
def measure(decoder: Decoder, tokens: int, batch: int, steps: int) -> Decoding:
    """One prefill of `tokens` random tokens, copied to all sequences; then `steps` greedy steps of each kind."""
    device = decoder.embed.weight.device
    cache = decoder.new_cache(1, tokens + 2 * (steps + WARM) + 1)
    rng = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(0, VOCABULARY, (tokens,), generator=rng, device=device)
    logits = decoder.extend(prompt, [tokens], cache).expand(batch, -1)
    cache.select([0] * batch)
    found, no_graph = {}, why_not_graph(decoder, cache)
    for name, graph in (("launches", False), ("graph", True)):
        if graph and no_graph:
            continue
        step = Step(decoder, cache, graph=graph)
        for _ in range(WARM):  # compiles, captures
            logits = step(logits.argmax(-1))
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            token = logits.argmax(-1)
            token.tolist()  # as generation reads each token
            logits = step(token)
        _wait(device)
        found[name] = batch * steps / (time.perf_counter() - start)
    return Decoding(found, cache.bytes(), formula_bytes(decoder, batch, cache.capacity), no_graph)


@torch.no_grad()
def prefill(decoder: Decoder, tokens: int) -> dict[str, float]:
    """Tokens a second of taking in `tokens` random ones of one sequence, at once and CHUNK at a time; the second time of each,
    since the first one compiles."""
    device, found = decoder.embed.weight.device, {}
    prompt = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator(device).manual_seed(0), device=device)
    cache = None
    for name, size in {"at once": tokens, f"{CHUNK} at a time": min(CHUNK, tokens)}.items():
        for _ in range(2):
            del cache
            cache = decoder.new_cache(1, tokens)
            _wait(device)
            start = time.perf_counter()
            for part in prompt.split(size):
                decoder.extend(part, [len(part)], cache)
            _wait(device)
            found[name] = tokens / (time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
