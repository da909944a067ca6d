"""How a decoder runs one of its layers: what the backward finds kept, and whether the layer is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sieve.model.block import Block
from sieve.model.context import Context

Checkpointing = Literal["none", "attention", "block", "full"]
Run = Callable[[Block, Tensor, Context, Checkpointing], tuple[Tensor, dict[str, Tensor]]]

# What "attention" keeps the results of: NSA's whole operator, full and window attention by whichever library.
_ATTENTION = frozenset({
    "sieve.nsa_forward.default", "sieve.window_forward.default", "torch_attn._varlen_attn.default",
    *(f"aten._scaled_dot_product_{kind}.default" for kind in (
        "flash_attention", "flash_attention_for_cpu", "cudnn_attention", "efficient_attention",
    )),
})

# Graphs of one function: kinds of layers, each in training and in evaluation, anew in each phase of the data.
GRAPHS = 64


def run_layer(layer: Block, x: Tensor, context: Context, keep: Checkpointing) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's forward, with activation checkpointing where gradients are wanted."""
    if keep == "none" or not torch.is_grad_enabled():
        return layer(x, context=context)
    contexts = {"context_fn": _keep_attention} if keep == "attention" else {}
    # Nothing is random, so no generator's state is kept.
    return checkpoint(layer, x, context=context, use_reentrant=False, preserve_rng_state=False, **contexts)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def compiled(backend: str | Callable[..., Any], fullgraph: bool) -> Run:
    """`run_layer` compiled (torch.compile): layers of one kind share a graph, their weights being inputs of it.

    Sizes are constants, for the fastest code, but for those that follow the documents of a micro-batch: the number of
    documents and the longest one's length, which the graph takes as they come. fullgraph: a part that cannot be traced is
    an error instead of a gap in the graph.
    """
    torch._dynamo.config.specialize_float = True  # norm_eps and the scores' scale are constants
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    run = torch.compile(run_layer, backend=backend, fullgraph=fullgraph, dynamic=True)

    def call(layer: Block, x: Tensor, context: Context, keep: Checkpointing) -> tuple[Tensor, dict[str, Tensor]]:
        torch._dynamo.mark_static(x)
        return run(layer, x, context, keep)

    return call


def pin_sizes(context: Context, batches: bool) -> Context:
    """Tell the compiler which of the context's tensors keep their sizes from step to step: all but cu_seqlens, and that
    too in a graph of its own where attention takes documents of one length as a batch (`batches`)."""
    if context.packing.even and not batches:  # torch 2.11 guards it where a checkpoint is traced, though nothing asks for it
        context = replace(context, packing=replace(context.packing, even=False))
    packing, slots = context.packing, context.slots
    tensors = [packing.doc, packing.position, *context.rotation, *(context.slot_rotation or ()), context.real]
    if packing.even:
        tensors.append(packing.cu_seqlens)
    if slots is not None:
        tensors += [slots.start, slots.position, slots.valid, slots.chunk]
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static(tensor)
    return context
