"""An NSA model's inner life on a probe text: gates, what is selected and from how far, and how much of full
attention's weight the selection catches, beside the most that any selection of that size could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sieve.eval.documents import document_loss, token_loss_of
from sieve.eval.examples import packed
from sieve.kernels.nsa.api import nsa_attention
from sieve.kernels.nsa.mass import oracle_blocks, recalled_mass
from sieve.model.decoder import Decoder
from sieve.model.switches import switched, variants


@torch.no_grad()
def probe(decoder: Decoder, texts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row an NSA layer: `layer`, the scalars of sieve.model.health, and over the queries that have more blocks to
    choose from than topk (else over none: None)

    mass_recalled: the share of full attention's weight, over the selection's keys, in the selected blocks; mass_oracle:
        in the topk blocks (forced ones included) with the most of it, summed over a group's heads; mass_forced: in the
        forced blocks alone.
    back: how many free choices lie 2^i to 2^(i+1) - 1 blocks back, by i, for the plot.
    """
    device = decoder.embed.weight.device
    tokens, packing = packed(texts, device)
    geometry = decoder.attention_config.geometry()
    deciding = packing.position // geometry.block_size >= geometry.topk  # [T]
    found: list[dict[str, Any]] = []

    def measured(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, indices = nsa_attention(*args, **kwargs)
        q, k_slc, scale = args[0], args[3], kwargs["scale"]
        best = oracle_blocks(q, k_slc, packing, geometry, scale=scale)
        current = (packing.position // geometry.block_size)[:, None, None]
        forced = (indices < geometry.init_blocks) | (indices > current - geometry.local_blocks)
        kinds = {"recalled": indices, "oracle": best, "forced": torch.where(forced, indices, -1)}
        row: dict[str, Any] = {}
        for kind, blocks in kinds.items():
            mass = recalled_mass(q, k_slc, blocks, packing, geometry, scale=scale)[deciding]
            row[f"mass_{kind}"] = mass.mean().item() if mass.numel() else None
        back = (current - indices)[(indices >= 0) & ~forced]
        power = torch.frexp(back.float()).exponent.long() - 1
        row["back"] = torch.bincount(power.clamp(min=0)).tolist() if power.numel() else []
        found.append(row)
        return out, indices

    labels = torch.full_like(tokens, -100)
    with switched(decoder, measured):
        health = decoder(tokens, labels, packing, collect=True).health
    layers = sorted({int(name.split("/")[1].removeprefix("layer_")) for name in health})
    return [
        {"layer": layer}
        | {name.rpartition("/")[2]: value.item() for name, value in health.items() if f"/layer_{layer:02d}/" in name}
        | row
        for layer, row in zip(layers, found)
    ]


def switch_losses(
    decoder: Decoder, documents: Sequence, bytes_of: Tensor, seq_len: int, batch_tokens: int,
    larger_topk: tuple[int, ...] = (),
) -> list[dict[str, Any]]:
    """The loss as the model is, and with each of sieve.model.switches' changes: `variant`, loss in nats, gap to the first."""
    rows: list[dict[str, Any]] = []
    operators = {"as trained": None} | variants(decoder.attention_config.geometry(), larger_topk)
    for name, operator in operators.items():
        with switched(decoder, operator):
            by_position, _ = document_loss(token_loss_of(decoder), documents, bytes_of, seq_len, batch_tokens)
        loss = by_position.mean()
        rows.append({"variant": name, "loss": loss, "gap": loss - rows[0]["loss"] if rows else 0.0})
    return rows
