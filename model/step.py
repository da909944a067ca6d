"""One new token for every sequence of a cache, step after step: launched anew, or replayed from a CUDA graph.

With one token a sequence all shapes are fixed, nothing is read on the host, and the decode kernels look at the lengths
on the device. So the step after the first ones is captured, with the cache's capacity as the bound of all lengths, and
the others replay it: the many small launches of a step then cost the host nothing.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from sieve.kernels.full.decode import why_not_triton
from sieve.kernels.nsa.decode import decode_kernels_missing
from sieve.model.cache import Cache
from sieve.model.decoder import Decoder

log = logging.getLogger(__name__)

# Before the capture: they compile and load the kernels, and take about the time that capturing does, so that batches which
# texts leave soon, each of which needs a graph of its own, lose at most as much as they would without.
PLAIN_STEPS = 16


def why_not_graph(model: Decoder, cache: Cache) -> str | None:
    """The reason why steps of `model` on `cache` cannot be replayed, or not with the same result; None if they can."""
    weight, config, attention = model.embed.weight, model.config, model.attention_config
    if not weight.is_cuda:
        return f"the model is on {weight.device.type}"
    if config.moe is not None:
        return "how experts' products are launched may depend on how many tokens each expert gets"
    if cache.longest < attention.dense_len < cache.capacity:
        return f"texts are dense up to {attention.dense_len} tokens and sparse afterwards (attention.dense_len)"
    kinds = set(attention.layer_types(config.num_layers))
    dims = config.head_dim_qk, config.head_dim_v
    if attention.impl in ("sdpa", "reference"):
        return f"attention.impl={attention.impl}"
    missing = decode_kernels_missing(weight.device, weight.dtype, 1, *dims) if "nsa" in kinds else None
    if missing is None:
        missing = why_not_triton(weight.device, weight.dtype, 1, *dims)
    return missing and f"the decode kernels cannot serve: {missing}"


class Step:
    """Called with int64 [B], the next token of each sequence of `cache`: logits [B, vocab], as Decoder.extend's.

    graph: replay a captured graph; the logits are then in memory that the next call writes over. The cache must not be
    changed from elsewhere (reserve, select, extend) while a Step with a graph is in use; make a new one then. Raises
    ValueError where a graph cannot be had.
    """

    def __init__(self, model: Decoder, cache: Cache, *, graph: bool = False) -> None:
        if graph and (reason := why_not_graph(model, cache)):
            raise ValueError(f"graph=True cannot be had: {reason}; use graph=False")
        self._model, self._cache, self._graph = model, cache, graph
        self._counts, self._done = [1] * cache.batch, 0
        self._captured: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if not self._graph:
            return self._model.extend(tokens, self._counts, self._cache)
        self._cache.after(self._counts)
        self._done += 1
        if self._done > PLAIN_STEPS and self._captured is None:
            self._capture(tokens)
        if self._captured is not None:
            self._tokens.copy_(tokens)
            self._captured.replay()
        else:  # not yet, or it failed
            self._logits = self._model.extend(tokens, self._counts, self._cache, bounded=True)
        self._cache.count(self._counts)
        return self._logits

    def _capture(self, tokens: Tensor) -> None:
        """Nothing of it runs: neither caches nor lengths change."""
        self._tokens = tokens.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._logits = self._model.extend(self._tokens, self._counts, self._cache, bounded=True)
        except RuntimeError as error:  # a library's kernel that no graph takes
            log.warning("decoding without a CUDA graph, since capturing one failed: %s", str(error).splitlines()[0])
            self._graph = False
        else:
            self._captured = graph
