"""The formulas of memory against what autograd really keeps, counted on fake CUDA tensors where no GPU is."""

from __future__ import annotations

import pytest
import torch

from sieve.kernels.nsa import triton_ops
from sieve.kernels.nsa.layout import Packing
from sieve.model import nsa as nsa_layer
from sieve.model.config import AttentionConfig, LossConfig, ModelConfig, MoEConfig
from sieve.model.decoder import Decoder
from sieve.model.memory import activations, states

T, VOCAB = 1024, 500
SIZES = dict(name="m", num_layers=3, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim_qk=32, head_dim_v=16,
             intermediate_size=160)
MOE = MoEConfig(num_experts=8, top_k=2, expert_size=48, num_shared=1)


def kept_bytes(model, attention, mode):
    """Of one forward on the CPU in fp32, NSA through the Triton operators' fakes: unique storages, no parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = attention.type == "nsa"
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16 if fake else torch.float32)  # grouped_mm's fake takes bf16 alone
        try:
            module = Decoder(model, attention, VOCAB, LossConfig(impl="torch", chunk_size=256))
        finally:
            torch.set_default_dtype(torch.float32)
        module.set_activation_checkpointing(mode)
        own = {p.untyped_storage()._cdata for p in module.parameters()}
        tokens = torch.zeros(1, T, dtype=torch.int64)
        packing = Packing.of(torch.tensor([0, T], dtype=torch.int32), T, T)
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(x):
            storage = x.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage
            return x

        if mode == "block":  # what checkpoint() keeps passes no hook: a layer's input
            for layer in module.layers:
                layer.register_forward_pre_hook(lambda _, inputs: void(pack(inputs[0])))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = module(tokens, tokens, packing)
        del out
        return sum(s.nbytes() for s in seen.values())


def void(_):
    """A hook that returns something would replace the inputs."""


def through_triton(monkeypatch):
    def operator(*args, impl, **kwargs):
        return triton_ops.nsa_attention(*args, **kwargs)

    monkeypatch.setattr(nsa_layer, "nsa_attention", operator)


@pytest.mark.parametrize("mode", ["none", "block"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_activations_are_what_autograd_keeps(kind, moe, mode, monkeypatch):
    through_triton(monkeypatch)
    model, attention = ModelConfig(**SIZES, moe=moe), AttentionConfig(type=kind)
    found = kept_bytes(model, attention, mode)
    formula = activations(model, attention, VOCAB, T, size=2 if kind == "nsa" else 4, mode=mode).total
    if mode == "block":  # cos and sin pass no hook either: checkpoint() holds them with its arguments
        found += T * model.head_dim_qk * 4
    if kind == "full" and mode == "none":  # the CPU's SDPA keeps its own output beside the reordered one that o_proj reads
        formula += model.num_layers * (T * model.num_heads * model.head_dim_qk * 4 + 2 * T * 8)
    assert formula == pytest.approx(found, rel=0.03), formula / found


def test_states_shrink_with_the_stage():
    sums = [sum(states(10**6, stage=stage, ranks=8, size=2, bucket=1000).values()) for stage in (1, 2, 3)]
    assert sums == sorted(sums, reverse=True)
    with pytest.raises(ValueError, match="there are none, block"):
        activations(ModelConfig(**SIZES), AttentionConfig(), VOCAB, T, size=2, mode="some")
