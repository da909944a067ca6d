"""The formulas of memory against what autograd really keeps, counted on fake CUDA tensors where no GPU is."""

from __future__ import annotations

import os

import pytest
import torch

from sieve.kernels.nsa import triton_ops
from sieve.kernels.nsa.layout import Packing
from sieve.model import nsa as nsa_layer
from sieve.model import stack
from sieve.model.config import AttentionConfig, LossConfig, ModelConfig, MoEConfig
from sieve.model.decoder import Decoder
from sieve.model.memory import activations, states

T, VOCAB = 1024, 500
SIZES = dict(name="m", num_layers=3, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim_qk=32, head_dim_v=16,
             intermediate_size=160)
MOE = MoEConfig(num_experts=8, top_k=2, expert_size=48, num_shared=1, impl="torch")
MODES = ["none", "attention", "block", "full"]


def kept_bytes(model, attention, mode, monkeypatch):
    """Of one forward on the CPU in fp32, NSA through the Triton operators' fakes in bf16: unique storages, no parameters."""
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

        caches = []
        if mode != "none":  # what checkpoint() keeps passes no hook: a layer's input, and what a policy says to save
            for layer in module.layers:
                layer.register_forward_pre_hook(lambda _, inputs: void(pack(inputs[0])))

            def contexts(made=stack._keep_attention):
                caches.append(made())
                return caches[-1]

            monkeypatch.setattr(stack, "_keep_attention", contexts)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = module(tokens, tokens, packing)
        for value in torch.utils._pytree.tree_leaves([forward.storage for forward, _ in caches]):
            if torch.is_tensor(kept := getattr(value, "val", value)):
                pack(kept)
        del out
        return sum(s.nbytes() for s in seen.values())


def void(_):
    """A hook that returns something would replace the inputs."""


def through_triton(monkeypatch):
    def operator(*args, impl, **kwargs):
        return triton_ops.nsa_attention(*args, **kwargs)

    monkeypatch.setattr(nsa_layer, "nsa_attention", operator)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_activations_are_what_autograd_keeps(kind, moe, mode, monkeypatch):
    through_triton(monkeypatch)
    model, attention = ModelConfig(**SIZES, moe=moe), AttentionConfig(type=kind)
    found = kept_bytes(model, attention, mode, monkeypatch)
    formula = activations(model, attention, VOCAB, T, size=2 if kind == "nsa" else 4, mode=mode).total
    if mode != "none":  # cos and sin pass no hook either: checkpoint() holds them with its arguments
        found += T * model.head_dim_qk * 4
    if kind == "full" and mode in ("none", "attention"):
        # The CPU's SDPA wants one head size, pads the output to it, and keeps that beside the one that o_proj reads.
        ours = model.head_dim_v if mode == "attention" else 0
        formula += model.num_layers * (T * model.num_heads * (model.head_dim_qk - ours) * 4 + (2 * T * 8 if not ours else 0))
    assert formula == pytest.approx(found, rel=0.03), formula / found


@pytest.mark.parametrize("impl", ["mixed", "triton"])
def test_experts_of_triton_keep_their_first_product(impl, monkeypatch):
    """In bf16 through the operators' fakes, as on a GPU."""
    pytest.importorskip("triton")
    through_triton(monkeypatch)
    monkeypatch.setattr("sieve.kernels.moe.api.why_not_triton", lambda device, dtype: None)
    model = ModelConfig(**SIZES, moe=MOE.model_copy(update={"impl": impl}))
    found = kept_bytes(model, AttentionConfig(), "none", monkeypatch)
    formula = activations(model, AttentionConfig(), VOCAB, T, size=2).total
    plain = activations(ModelConfig(**SIZES, moe=MOE), AttentionConfig(), VOCAB, T, size=2).total
    assert formula == pytest.approx(found, rel=0.03) and formula < plain, formula / found


def test_states_shrink_with_the_stage():
    sums = [sum(states(10**12, stage=stage, ranks=8, size=2, bucket=1000).values()) for stage in (1, 2, 3)]
    assert sums == sorted(sums, reverse=True)
    with pytest.raises(ValueError, match="there are none, attention, block, full"):
        activations(ModelConfig(**SIZES), AttentionConfig(), VOCAB, T, size=2, mode="some")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a CPU Triton's operators need its interpreter")
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_what_compiled_layers_keep(moe, monkeypatch):
    """By the partitioner that inductor uses, NSA's operator opaque as on a GPU: what it computes here is nothing."""

    def forward(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, packing, geometry, *, scale, keep):
        out = q.new_zeros(*q.shape[:2], v_slc.shape[2])
        indices = torch.zeros(*v_slc.shape[:2], geometry.topk, dtype=torch.int32)
        lse = tuple(q.new_zeros(q.shape[:2], dtype=torch.float32) for _ in range(3))
        return out, indices, lse, tuple(out.clone() for _ in range(3)) if keep else None

    monkeypatch.setattr(triton_ops.autograd, "forward", forward)
    model, attention = ModelConfig(**SIZES, moe=moe), AttentionConfig(impl="triton")
    torch._dynamo.reset()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = Decoder(model, attention, VOCAB, LossConfig(impl="torch", chunk_size=256))
    finally:
        torch.set_default_dtype(torch.float32)
    module.compile_layers(backend="aot_eager_decomp_partition")
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(x):
        seen[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    tokens, packing = torch.zeros(1, T, dtype=torch.int64), Packing.of(torch.tensor([0, T], dtype=torch.int32), T, T)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = module(tokens, tokens, packing)
    found = sum(s.nbytes() for key, s in seen.items() if key not in own)
    del out
    torch._dynamo.reset()
    formula = activations(model, attention, VOCAB, T, size=2, compiled=True).total
    assert formula == pytest.approx(found, rel=0.02), formula / found
