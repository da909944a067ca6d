"""The language model: embedding, layers, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sieve.kernels.common.ranges import named
from sieve.kernels.nsa.layout import Packing
from sieve.model.block import Block
from sieve.model.cache import Cache
from sieve.model.config import AttentionConfig, LossConfig, ModelConfig, RopeConfig
from sieve.model.context import Context
from sieve.model.head import Head
from sieve.model.health import layer_health
from sieve.model.loss import IGNORE
from sieve.model.norm import RMSNorm
from sieve.model.nsa import NSA
from sieve.model.offload import Offload
from sieve.model.rope import attention_scale
from sieve.model.router import update_biases
from sieve.model.stack import Checkpointing, Run, compiled, pin_sizes, run_layer


class DecoderOutput(NamedTuple):
    """loss_sum: fp32 scalar, what is differentiated: cross entropy and z-loss summed over labelled tokens, plus the
        layers' auxiliary losses times the count of labelled tokens; divide by the labelled tokens of the global batch.
    ce_sum: fp32 scalar, the cross entropy's part of it, detached.
    token_loss: fp32 [B, S], cross entropy of each token in nats, 0 where unlabelled; None unless asked for.
    expert_load: by layer, fp32 [E], how many of the tokens each expert got.
    router_sample: by layer, fp32 [n, E], scores of some tokens, where the bias follows from them; else empty.
    health: with collect, fp32 scalars `nsa/layer_NN/<name of sieve.model.health>`; else empty.
    """

    loss_sum: Tensor
    ce_sum: Tensor
    token_loss: Tensor | None
    expert_load: dict[int, Tensor]
    router_sample: dict[int, Tensor]
    health: dict[str, Tensor]


class Decoder(nn.Module):
    """A decoder over packed documents. Its weights have no meaning (partly NaN) until sieve.model.init.initialize.

    Raises ValueError when attention.layers does not fit the number of layers.
    """

    def __init__(
        self, model: ModelConfig, attention: AttentionConfig, vocab_size: int, loss: LossConfig | None = None
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1; it is the tokenizer's")
        self.config, self.attention_config, self.vocab_size = model, attention, vocab_size
        self.checkpointing: Checkpointing = "none"
        self.offload: Offload | None = None
        self._compiled: Run | None = None
        self.embed = nn.Embedding(vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Block(model, attention, i) for i in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.head = Head(model.hidden_size, vocab_size, loss or LossConfig())
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable, recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)
        self._tie()  # leaving the meta device replaces parameters one by one
        return self

    def set_activation_checkpointing(self, mode: Checkpointing, offload: bool = False) -> None:
        """What training keeps of a layer for its backward; the rest is computed again there, with equal results.

        none: all. attention: its input and what the attention operator returned. block: its input. full: its input, and
        NSA's operator keeps nothing between its own forward and backward either (attention.save_outputs=false).
        offload: the layers' inputs are kept in host memory (sieve.model.offload).

        Raises ValueError for another mode, and for offload with none.
        """
        if mode not in get_args(Checkpointing):
            raise ValueError(f"activation checkpointing {mode!r} is not one of {', '.join(get_args(Checkpointing))}")
        if offload and mode == "none":
            raise ValueError("offload=True needs activation checkpointing attention, block or full: none keeps no inputs alone")
        self.checkpointing, self.offload = mode, Offload() if offload else None
        for layer in self.layers:
            if isinstance(layer.attention, NSA):
                layer.attention.save_outputs = self.attention_config.save_outputs and mode != "full"

    def compile_layers(self, *, backend: str | Callable[..., Any] = "inductor", fullgraph: bool = True) -> None:
        """Run the layers through torch.compile where a loss is asked for; see sieve.model.stack.compiled."""
        self._compiled = compiled(backend, fullgraph)

    def set_rope(self, rope: RopeConfig) -> None:
        """Rotate by `rope` from now on: a longer context's YaRN, say. No parameter changes."""
        if rope == self.config.rope:
            return
        self.config = self.config.model_copy(update={"rope": rope})
        for layer in self.layers:
            layer.attention.scale = attention_scale(rope, self.config.head_dim_qk)

    def forward(
        self, tokens: Tensor, labels: Tensor | None, packing: Packing, *, padding: Tensor | None = None,
        collect: bool = False, per_token: bool = False, at: Tensor | None = None,
    ) -> DecoderOutput | Tensor:
        """tokens, labels int64 [B, S] (label -100 = none); packing lays out their B * S tokens, row after row.

        padding: bool [B, S], tokens without meaning, which the balance of experts leaves out; None: there are none.
        collect: fill `health`. per_token: fill `token_loss`. at: instead of a loss, the next-token logits [n, vocab] at
        the places int64 [n] among the B * S; labels play no part then.
        """
        x, reports = self._hidden(tokens, packing, collect, padding, self._compiled if at is None else None)
        if at is not None:
            return self.head(x[at])
        labels = labels.flatten()
        with named("loss"):
            loss, ce, token = self.head(x, labels, per_token)
        penalties = [report["aux_loss"] for report in reports if "aux_loss" in report]
        if penalties:
            loss = loss + torch.stack(penalties).sum() * (labels != IGNORE).sum()
        return DecoderOutput(
            loss_sum=loss,
            ce_sum=ce.detach(),
            token_loss=None if token is None else token.view_as(tokens),
            expert_load={i: report["load"] for i, report in enumerate(reports) if "load" in report},
            router_sample={i: report["sample"] for i, report in enumerate(reports) if "sample" in report},
            health={
                f"nsa/layer_{i:02d}/{name}": value
                for i, report in enumerate(reports) for name, value in report.get("health", {}).items()
            },
        )

    def logits(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Next-token logits [B, S, vocab] of tokens int64 [B, S]; in full, so for tests and short texts."""
        return self.head(self.hidden(tokens, packing)).view(*tokens.shape, -1)

    def hidden(self, tokens: Tensor, packing: Packing) -> Tensor:
        """What the head gets: [B * S, hidden]."""
        return self._hidden(tokens, packing)[0]

    @torch.no_grad()
    def extend(
        self, tokens: Tensor, counts: Sequence[int], cache: Cache, *, every: bool = False, bounded: bool = False
    ) -> Tensor:
        """Next-token logits of new tokens after what `cache` holds, and the tokens into it.

        tokens int64 [T]: counts[b] new ones of sequence b, laid end to end, as many at a time as one likes. -> [B, vocab]
        after each sequence's last new token (NaN for one without new tokens), or with `every` [T, vocab] after each.
        Equal to `logits` of the whole sequences within rounding. bounded: see Cache.begin.
        Raises ValueError when counts do not fit the tokens or
        the cache.
        """
        x = self.extend_hidden(tokens, counts, cache, bounded=bounded)
        if every:
            return self.head(x)
        if max(counts) == 1 == min(counts):
            return self.head(x)
        last = torch.tensor(counts, device=x.device).cumsum(0) - 1
        logits = self.head(x[last])
        idle = [row for row, count in enumerate(counts) if not count]
        return logits.index_fill_(0, torch.tensor(idle, device=x.device), torch.nan) if idle else logits

    @torch.no_grad()
    def extend_hidden(
        self, tokens: Tensor, counts: Sequence[int], cache: Cache, *, bounded: bool = False
    ) -> Tensor:
        """As `extend`, but what the head would get: [T, hidden]."""
        if sum(counts) != tokens.numel():
            raise ValueError(f"counts={list(counts)} add up to {sum(counts)}, tokens {list(tokens.shape)} has {tokens.numel()}")
        chunk = cache.begin(counts, bounded=bounded)
        context = Context.of_chunk(self.config, self.attention_config, chunk)
        x = self.embed(tokens.flatten())
        for layer, own in zip(self.layers, cache.layers):
            x, _ = layer(x, context=context, cache=own)
        cache.commit(chunk)
        if not bounded:
            cache.count(counts)
        return self.norm(x)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache of this model for `batch` sequences of up to `capacity` tokens, where and as its weights are."""
        weight = self.embed.weight
        return Cache(self.config, self.attention_config, batch, capacity, device=weight.device, dtype=weight.dtype)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """What `new_cache` would take, without taking it."""
        weight = self.embed.weight
        # More tokens than fit anywhere, whose bytes still fit an integer.
        capacity = min(capacity, 2**40)
        return Cache(self.config, self.attention_config, batch, capacity, device="meta", dtype=weight.dtype).bytes()

    def _hidden(
        self, tokens: Tensor, packing: Packing, collect: bool = False, padding: Tensor | None = None,
        faster: Run | None = None,
    ) -> tuple[Tensor, list[dict]]:
        if packing.total_tokens != tokens.numel():
            raise ValueError(
                f"packing lays out {packing.total_tokens} tokens, tokens {list(tokens.shape)} has {tokens.numel()}"
            )
        context = Context.of(self.config, self.attention_config, packing, padding)
        if faster is not None:
            context = pin_sizes(context, batches=self.attention_config.dense_impl == "cudnn")
        x = self.embed(tokens.flatten())  # [T, hidden]
        reports = []
        offloaded = self.offload is not None and torch.is_grad_enabled()
        for layer in self.layers:
            watched = layer.attention._forward_pre_hooks  # a compiled layer would pass over a hook of its parts
            run = run_layer if faster is None or watched else faster
            with self.offload.of(x) if offloaded else nullcontext():
                x, report = run(layer, x, context, self.checkpointing)
            gates, indices = report.pop("gates", None), report.pop("indices", None)
            if collect and isinstance(layer.attention, NSA):
                report["health"] = layer_health(gates, indices, packing, layer.attention.geometry, x.device)
            reports.append(report)
        return self.norm(x), reports

    @contextmanager
    def settling(self, whole: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Forwards within it set the routers' biases before they route, layer by layer: bias_update="quantile" with the
        scores of the forward's own tokens, `whole` making of a sample [n, E] of them that of the global batch.

        For tokens that have been trained on: their new scores tell what the update has done to those of the next ones.
        """
        routers = [layer.mlp.router for layer in self.layers if layer.routed]
        for router in routers:
            router.settle = whole
        try:
            yield
        finally:
            for router in routers:
                router.settle = None

    def update_router_bias(self, load: dict[int, Tensor], sample: dict[int, Tensor] | None = None) -> None:
        """One balancing step after an optimizer step: load[layer] fp32 [E] of the global batch, or with
        bias_update="quantile" sample[layer] fp32 [n, E] of it, as many rows in each layer (sieve.model.balance).

        Does nothing for models that do not balance by bias.
        """
        if self.config.moe is None or self.config.moe.balance not in ("bias", "both"):
            return
        if self.config.moe.bias_update == "quantile":
            update_biases([self.layers[index].mlp.router for index in sample], list(sample.values()))
            return
        for index, tokens in load.items():
            self.layers[index].mlp.router.update_bias(tokens)
