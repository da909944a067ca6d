"""Compiled layers: one graph for each kind of layer, whatever the documents of a micro-batch."""

import os

import pytest
import torch

from sieve.model import attention as attention_module

LENGTHS = [[20, 12], [8, 9, 15], [32], [4] * 8]

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a CPU Triton's operators need its interpreter"
)


@pytest.fixture(autouse=True)
def quick_attention(monkeypatch):
    """What is traced is as on a GPU: opaque operators of known shapes. What they compute here is quick, not attention."""
    triton_ops = pytest.importorskip("sieve.kernels.nsa.triton_ops")

    calls = []

    def forward(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, packing, geometry, *, scale, keep):
        calls.append(keep)
        heads = q.shape[1] // v_slc.shape[1]
        out = (q * v_slc.repeat_interleave(heads, 1) * gates.sum(-1, keepdim=True)).contiguous()
        indices = torch.zeros(*v_slc.shape[:2], geometry.topk, dtype=torch.int32)
        lse = tuple(q.new_zeros(q.shape[:2], dtype=torch.float32) for _ in range(3))
        return out, indices, lse, tuple(out.clone() for _ in range(3)) if keep else None

    def backward(do, *args, **kwargs):
        return tuple((i + 1) * do.float().mean() * torch.ones_like(x) for i, x in enumerate(args[:8]))

    monkeypatch.setattr(triton_ops.autograd, "forward", forward)
    monkeypatch.setattr(triton_ops.autograd, "backward", backward)

    def attend(q, k, v, packing, *, scale, window=None, impl="auto"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        far = packing.max_seqlen if window is None else window
        back = packing.position[:, None] - packing.position
        seen = (packing.doc[:, None] == packing.doc) & (back >= 0) & (back < far)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    monkeypatch.setattr(attention_module, "attention", attend)
    return calls


@pytest.fixture
def counted():
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    yield counter
    torch._dynamo.reset()


def batch(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (1, sum(lengths)), generator=generator) for _ in range(2)]


def gradients(decoder, lengths, seed, pack, **kwargs):
    decoder.zero_grad()
    out = decoder(*batch(lengths, seed), pack(lengths), **kwargs)
    out.loss_sum.backward()
    return out, {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


ALONE, MIXED = (("nsa",), False, 1), (("nsa", "window"), True, 2)
KINDS = [  # each kind of layer, and each mode, with and without experts
    (*ALONE, "none"), (*ALONE, "full"), (("full",), True, 2, "attention"), (*MIXED, "none"), (*MIXED, "full"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (*ALONE, "attention"), (("full",), True, 2, "none"), (("full",), True, 2, "full"), (*MIXED, "attention"),
    ]),
]


@pytest.mark.parametrize(("layers", "mixture", "kinds", "checkpointing"), KINDS)
def test_no_break_and_no_recompilation(layers, mixture, kinds, checkpointing, model, attention, build, pack, counted):
    from torch._dynamo.utils import counters

    sizes = dict(head_dim_qk=16, head_dim_v=16) | ({} if mixture else {"moe": None})
    decoder = build(model(**sizes), attention(layers=layers, impl="triton" if "nsa" in layers else "auto"))
    if mixture:
        decoder.bfloat16()  # the one dtype of which grouped products can be traced
    decoder.set_activation_checkpointing(checkpointing)
    plain = [gradients(decoder, lengths, i, pack, collect=i % 3 == 0) for i, lengths in enumerate(LENGTHS)]
    names = set(decoder.state_dict())
    decoder.compile_layers(backend=counted)
    assert set(decoder.state_dict()) == names
    for i, (lengths, (wanted, exact)) in enumerate(zip(LENGTHS, plain)):
        out, grads = gradients(decoder, lengths, i, pack, collect=i % 3 == 0)
        torch.testing.assert_close(out.loss_sum, wanted.loss_sum, rtol=1e-2 if mixture else 1e-5, atol=0)
        assert out.health.keys() == wanted.health.keys() and bool(out.health) == ("nsa" in layers and i % 3 == 0)
        a, b = (torch.cat([g[name].float().flatten() for name in exact]) for g in (grads, exact))
        assert torch.cosine_similarity(a, b, dim=0) > (0.99 if mixture else 0.999999)
        assert counted.frame_count == kinds, f"after {i + 1} steps"
    assert not counters["graph_break"]
    decoder.eval()
    with torch.no_grad():
        for i, lengths in enumerate(LENGTHS):
            decoder(*batch(lengths, i), pack(lengths), per_token=True)
    assert counted.frame_count == 2 * kinds  # evaluation has graphs of its own
    decoder.train()
    gradients(decoder, LENGTHS[0], 0, pack)
    assert counted.frame_count == 2 * kinds and not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_scores_to_balance_by_leave_one_graph(checkpointing, model, moe, attention, build, pack, counted):
    from torch._dynamo.utils import counters

    mixture = moe(bias_update="quantile", bias_tokens=16)
    decoder = build(model(head_dim_qk=16, head_dim_v=16, moe=mixture), attention(layers=("full",))).bfloat16()
    decoder.set_activation_checkpointing(checkpointing)
    wanted, _ = gradients(decoder, LENGTHS[0], 0, pack)
    decoder.compile_layers(backend=counted)
    for i, lengths in enumerate(LENGTHS):
        padding = (torch.arange(32) >= 28)[None]
        out, _ = gradients(decoder, lengths, i, pack, padding=padding)
        assert out.router_sample[1].shape == (16, 4) and out.router_sample[1][14:].isnan().all()
        if i == 0:
            torch.testing.assert_close(out.router_sample[1][:14], wanted.router_sample[1][:14], rtol=0.02, atol=0.01)
        decoder.update_router_bias(out.expert_load, out.router_sample)
        with torch.no_grad(), decoder.eval().settling(lambda sample: sample):
            decoder(batch(lengths, i)[0], None, pack(lengths), at=torch.zeros(1, dtype=torch.int64))
        decoder.train()
        assert counted.frame_count == 2 and not counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("mode", "times", "keeps"), [
    ("none", 1, True), ("attention", 1, True), ("block", 2, True), ("full", 2, False),
])
def test_what_is_computed_twice(mode, times, keeps, compiled, model, attention, build, pack, counted, quick_attention):
    decoder = build(model(head_dim_qk=16, head_dim_v=16, moe=None), attention(impl="triton"))
    decoder.set_activation_checkpointing(mode)
    if compiled:
        decoder.compile_layers(backend=counted)
    gradients(decoder, [20, 12], 0, pack)
    assert len(quick_attention) == 2 * times and quick_attention[-1] == keeps
    decoder.set_activation_checkpointing("none")
    assert all(layer.attention.save_outputs for layer in decoder.layers)


@pytest.mark.parametrize("mode", ["attention", "block", "full"])
def test_offloading_changes_no_graph(mode, model, attention, build, pack, counted):
    """What the graphs save goes through the hooks when they run: the layer's input to the host, and nothing else."""
    from torch._dynamo.utils import counters

    decoder = build(model(num_layers=3, head_dim_qk=16, head_dim_v=16, moe=None), attention(impl="triton"))
    decoder.compile_layers(backend=counted)
    decoder.set_activation_checkpointing(mode)
    plain = [gradients(decoder, lengths, i, pack) for i, lengths in enumerate(LENGTHS)]
    assert counted.frame_count == 1
    for again in range(2):  # with the graphs of before, and with ones made under the hooks
        decoder.set_activation_checkpointing(mode, offload=True)
        for i, (lengths, (wanted, exact)) in enumerate(zip(LENGTHS, plain)):
            out, grads = gradients(decoder, lengths, i, pack)
            assert torch.equal(out.loss_sum, wanted.loss_sum)
            assert all(torch.equal(grads[name], grad) for name, grad in exact.items())
            assert decoder.offload.packed == 3 * (i + 1) and decoder.offload.fetched == 2 * (i + 1)
            assert decoder.offload.bytes == decoder.offload.packed * 32 * 32 * 4 and decoder.offload.buffers == 3
            assert counted.frame_count == again + 1
        torch._dynamo.reset()
    assert not counters["graph_break"]


def test_a_watched_layer_is_not_compiled(model, attention, build, pack, counted):
    """Hooks on a layer's parts are passed over by a graph that has been made without them."""
    decoder = build(model(head_dim_qk=16, head_dim_v=16, moe=None), attention(impl="triton"))
    decoder.compile_layers(backend=counted)
    gradients(decoder, [20, 12], 0, pack)
    seen = []
    hook = decoder.layers[1].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    gradients(decoder, [20, 12], 0, pack)
    hook.remove()
    gradients(decoder, [20, 12], 0, pack)
    assert seen == [(32, 32)] and counted.frame_count == 1
