"""The NSA layer's wiring against the paper's formulas, one query, head and block at a time."""

import math
import os

import pytest
import torch

from sieve.kernels.nsa.layout import Packing
from sieve.model.attention import Attention
from sieve.model.context import Context
from sieve.model.health import NAMES, layer_health
from sieve.model.nsa import NSA, Phi
from sieve.model.rope import rotate, rotation

LENGTHS = [70, 3, 31]


def layer_of(model, config, seed=0):
    layer = NSA(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, p.shape[-1] ** -0.5)
    return layer


def phi_by_hand(phi, block):
    """block [l, D] of one head -> [D]."""
    if phi.kind == "mean":
        return block.mean(0)
    out = phi.w_in @ (block + phi.position).flatten()
    return phi.w_out @ torch.nn.functional.silu(out) if phi.kind == "mlp" else out


def by_hand(layer, config, model, x):
    """A document of its own: x [L, hidden] -> out, and each query's chosen blocks by group."""
    L, l, d, size = len(x), config.kernel_size, config.kernel_stride, config.block_size
    heads = lambda y, n: y.unflatten(-1, (n, -1))  # noqa: E731
    turn = lambda y, start, step: rotate(y, rotation(start + step * torch.arange(len(y)), model.rope, 12))  # noqa: E731
    q = turn(layer.q_norm(heads(layer.q_proj(x), 4)), 0, 1)
    k, v = heads(layer.k_proj(x), 2), heads(layer.v_proj(x), 2)
    k_slc = turn(layer.k_norm(k), 0, 1)
    k_raw, v_raw, k_win, v_win = k, v, k_slc, v
    if not config.share_kv:
        k_raw, v_raw = heads(layer.k_cmp_proj(x), 2), heads(layer.v_cmp_proj(x), 2)
        k_win, v_win = turn(layer.k_win_norm(heads(layer.k_win_proj(x), 2)), 0, 1), heads(layer.v_win_proj(x), 2)
    starts = range(0, L - l + 1, d)
    k_cmp = [torch.stack([phi_by_hand(layer.k_phi, k_raw[s : s + l, g]) for g in range(2)]) for s in starts]
    v_cmp = [torch.stack([phi_by_hand(layer.v_phi, v_raw[s : s + l, g]) for g in range(2)]) for s in starts]
    if starts:
        k_cmp, v_cmp = layer.k_cmp_norm(torch.stack(k_cmp)), torch.stack(v_cmp)
        k_cmp = turn(k_cmp, 0, d) if config.compressed_rope else k_cmp
    gate = torch.sigmoid(layer.gate(x)).view(L, 4, 3)
    out, chosen = torch.zeros(L, 4, 8), {}
    for t in range(L):
        visible = [i for i, s in enumerate(starts) if s + l - 1 <= t]
        current = t // size
        for g in range(2):
            importance = torch.zeros(current + 1)
            own = {}
            for h in (2 * g, 2 * g + 1):
                if not visible:
                    own[h] = torch.zeros(8)
                    continue
                p = torch.softmax(k_cmp[visible, g] @ q[t, h] / math.sqrt(12), 0)
                own[h] = p @ v_cmp[visible, g]
                for i, weight in zip(visible, p):
                    for j in range(current + 1):  # overlap in tokens, over the stride
                        shared = max(0, min(i * d + l, (j + 1) * size) - max(i * d, j * size))
                        importance[j] += weight * shared / d
            forced = {j for j in range(current + 1) if j < config.init_blocks or j > current - config.local_blocks}
            free = sorted((j for j in range(current + 1) if j not in forced), key=lambda j: (-importance[j].item(), j))
            blocks = sorted(forced | set(free[: config.topk - len(forced)]))
            chosen[t, g] = blocks
            tokens = [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]
            near = list(range(max(0, t - config.window_size + 1), t + 1))
            for h in (2 * g, 2 * g + 1):
                slc = torch.softmax(k_slc[tokens, g] @ q[t, h] / math.sqrt(12), 0) @ v[tokens, g]
                win = torch.softmax(k_win[near, g] @ q[t, h] / math.sqrt(12), 0) @ v_win[near, g]
                out[t, h] = gate[t, h, 0] * own[h] + gate[t, h, 1] * slc + gate[t, h, 2] * win
    return out.flatten(1) @ layer.o_proj.weight.T, chosen


@pytest.mark.parametrize("changes", [
    {}, {"share_kv": True, "phi": "linear"}, {"phi": "mean", "compressed_rope": False}, {"qk_norm": True},
    {"qk_norm": True, "share_kv": True},
], ids=str)
def test_against_the_formulas(model, attention, pack, changes):
    # Small blocks, so that the longest document has blocks to leave out.
    config, cfg = attention(block_size=8, kernel_size=4, kernel_stride=2, window_size=7, **changes), model()
    layer = layer_of(cfg, config)
    x = torch.randn(sum(LENGTHS), 32)
    with torch.no_grad():
        out, aux = layer(x, context=Context.of(cfg, config, pack(LENGTHS)))
        wanted, chosen = zip(*(by_hand(layer, config, cfg, part) for part in x.split(LENGTHS)))
    assert set(aux) == {"gates", "indices"}
    torch.testing.assert_close(out, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert sum(len(blocks) < t // 8 + 1 for (t, _), blocks in chosen[0].items()) > 40  # selection did select


def test_every_weight_learns(model, attention, pack):
    config, cfg = attention(qk_norm=True), model()
    layer = layer_of(cfg, config)
    out, _ = layer(torch.randn(100, 32), context=Context.of(cfg, config, pack([64, 36])))
    out.square().sum().backward()
    idle = [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert not idle


def test_no_gradient_passes_between_documents(model, attention, pack):
    config, cfg = attention(), model()
    layer = layer_of(cfg, config)
    x = torch.randn(101, 32, requires_grad=True)
    out, _ = layer(x, context=Context.of(cfg, config, pack([33, 35, 33])))
    out[33:68].sum().backward()
    assert x.grad[33:68].any(1).all() and not x.grad[:33].any() and not x.grad[68:].any()


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("head_dim", [32, 192])
def test_phi_starts_with_outputs_as_large_as_its_inputs(kind, head_dim, model, pack):
    from sieve.model.config import AttentionConfig
    from sieve.model.init import initial_value

    config = AttentionConfig(phi=kind)  # the paper's geometry
    phi = Phi(config, head_dim)
    with torch.no_grad():
        for name, p in phi.named_parameters():
            p.copy_(initial_value(f"layers.0.attention.k_phi.{name}", p.shape, model(), seed=0))
        x = 0.7 * torch.randn(256, 2, head_dim, generator=torch.Generator().manual_seed(0))
        context = Context.of(model(head_dim_qk=head_dim), config, pack([256]))
        out = phi(x, context.slots)[context.slots.valid]
    assert 0.5 < out.std() / x.std() < 2


def test_collect_reports_health(model, attention, pack):
    config, cfg = attention(), model()
    layer = layer_of(cfg, config)
    x = torch.randn(40, 32)
    packing = pack([40])
    with torch.no_grad():
        _, aux = layer(x, context=Context.of(cfg, config, packing))
    health = layer_health(aux["gates"], aux["indices"], packing, layer.geometry, x.device)
    assert set(health) == {
        "gate_cmp", "gate_slc", "gate_win", "saturated_cmp", "saturated_slc", "saturated_win", "selected_distance",
        "forced_share", "selection_overlap", "selection_entropy", "never_selected",
    }
    torch.testing.assert_close(health["gate_slc"], torch.sigmoid(layer.gate(x)).view(40, 4, 3)[..., 1].mean())


def full_twin(layer, model, config):
    """An Attention layer with the weights that it shares with an NSA layer by name."""
    twin = Attention(model, config.model_copy(update={"type": "full"}), None)
    twin.load_state_dict({name: layer.state_dict()[name] for name in twin.state_dict()})
    return twin


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "share_kv": True}], ids=str)
def test_up_to_dense_len_it_is_its_full_attention_twin(model, attention, pack, changes):
    config, cfg = attention(dense_len=70, **changes), model()
    layer = layer_of(cfg, config)
    twin = full_twin(layer, cfg, config)
    x = torch.randn(sum(LENGTHS), 32)
    context = Context.of(cfg, config, pack(LENGTHS))
    out, aux = layer(x, context=context)
    want, _ = twin(x, context=context)
    assert torch.equal(out, want)
    out.square().sum().backward()
    want.square().sum().backward()
    shared = dict(twin.named_parameters())
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, shared[name].grad if name in shared else torch.zeros_like(p)), name
    health = layer_health(aux.get("gates"), aux.get("indices"), context.packing, layer.geometry, x.device)
    assert set(health) == set(NAMES) and all(value.isnan() for value in health.values())


def test_one_longer_document_makes_it_sparse(model, attention, pack):
    cfg, x = model(), torch.randn(sum(LENGTHS), 32)
    layer = layer_of(cfg, attention())
    outs = [layer(x, context=Context.of(cfg, attention(dense_len=n), pack(LENGTHS)))[0] for n in (0, 69, 70)]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_save_outputs_is_handed_on(model, attention, pack, monkeypatch):
    from sieve.model import nsa

    seen = []
    original = nsa.nsa_attention
    monkeypatch.setattr(nsa, "nsa_attention", lambda *a, **k: seen.append(k["save_outputs"]) or original(*a, **k))
    for keep in (True, False):
        config, cfg = attention(save_outputs=keep), model()
        layer_of(cfg, config)(torch.randn(20, 32), context=Context.of(cfg, config, pack([20])))
    assert seen == [True, False]


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="a Triton kernel runs on a CPU only in the interpreter"
    )),
    pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def test_the_layer_compiles_in_one_graph(model, attention, pack, device):
    """Projections, phi, the Triton operator and gates, forward and backward."""
    pytest.importorskip("triton")
    config, cfg = attention(impl="triton"), model(head_dim_qk=16, head_dim_v=16)
    layer = layer_of(cfg, config).to(device)
    x = torch.randn(12, 32, device=device, requires_grad=True)
    packing = pack([9, 3])
    packing = Packing(*(getattr(packing, n).to(device) for n in ("cu_seqlens", "doc", "position")), packing.max_seqlen)
    context = Context.of(cfg, config, packing)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: layer(x, context=context)[0], fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor"
    )
    (eager, want), (out, got) = (
        (y, torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
        for y in (layer(x, context=context)[0], compiled(x))
    )
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
