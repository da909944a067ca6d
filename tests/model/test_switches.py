"""The switches against what they stand for."""

import pytest
import torch

from sieve.kernels.nsa import reference
from sieve.kernels.nsa.mass import oracle_blocks, recalled_mass
from sieve.model.switches import full, oracle, switched, variants, with_topk, without


@pytest.fixture
def probe(model, attention, build, pack):
    """A decoder, its logits as it is, and run(operator): its logits with the operator."""
    decoder, packing = build(model(moe=None), attention()), pack([120, 77])
    tokens = torch.randint(0, 61, (1, 197), generator=torch.Generator().manual_seed(0))

    def run(operator):
        with torch.no_grad(), switched(decoder, operator):
            return decoder.logits(tokens, packing)[0]

    with torch.no_grad():
        return decoder, decoder.logits(tokens, packing)[0], run


def test_topk_large_enough_is_full(probe, attention, model, build):
    _, plain, run = probe
    torch.testing.assert_close(run(with_topk(8)), run(full), rtol=1e-4, atol=1e-5)
    assert torch.equal(run(with_topk(4)), plain)
    assert not torch.allclose(run(full), plain, atol=1e-3)
    # As long as every block is chosen anyway, nothing can change: 4 blocks of 16 tokens.
    for operator in (full, oracle):
        torch.testing.assert_close(run(operator)[:64], plain[:64], rtol=1e-4, atol=1e-5)


def test_without_a_branch_is_a_gate_of_zero(probe):
    decoder, plain, run = probe
    heads = 4
    for branch, name in enumerate(("compression", "selection", "window")):
        got = run(without(name))
        kept = []
        for layer in decoder.layers:
            gate = layer.attention.gate
            handle = gate.register_forward_hook(
                lambda module, args, out, branch=branch: out.view(-1, heads, 3).index_fill(
                    2, torch.tensor([branch]), -torch.inf).flatten(1)
            )
            kept.append(handle)
        torch.testing.assert_close(got, run(None), rtol=1e-4, atol=1e-5)
        [handle.remove() for handle in kept]
        assert not torch.allclose(got, plain, atol=1e-3)


def test_oracle_and_recalled_mass_by_hand():
    from sieve.kernels.nsa.geometry import Geometry
    from sieve.kernels.nsa.layout import Packing

    geometry = Geometry(8, 4, 16, topk=4, init_blocks=1, local_blocks=2, window_size=12)
    rng = torch.Generator().manual_seed(1)
    T, H, K, D = 150, 4, 2, 16
    q, k = torch.randn(T, H, D, generator=rng) * 3, torch.randn(T, K, D, generator=rng)
    packing = Packing.of(torch.tensor([0, 110, 150], dtype=torch.int32), T, 110)
    indices = oracle_blocks(q, k, packing, geometry, scale=0.25, chunk=50)
    mass = recalled_mass(q, k, indices, packing, geometry, scale=0.25, chunk=50)
    for t in (0, 15, 70, 100, 109, 110, 149):
        first = 0 if t < 110 else 110
        for head in range(H):
            p = torch.softmax(k[first : t + 1, head // 2] @ q[t, head] * 0.25, 0)
            own = [j for j in indices[t, head // 2].tolist() if j >= 0]
            share = sum(p[j * 16 : (j + 1) * 16].sum().item() for j in own)
            assert mass[t, head].item() == pytest.approx(share, abs=1e-5)
        if t - first >= 64:
            p = [torch.softmax(k[first : t + 1, 0] @ q[t, h] * 0.25, 0) for h in range(2)]
            current = (t - first) // 16
            free = [j for j in range(1, current - 1)]
            best = max(free, key=lambda j: sum(x[j * 16 : (j + 1) * 16].sum().item() for x in p))
            assert set(indices[t, 0].tolist()) == {0, best, current - 1, current}
    # No choice catches more, summed over a group's heads, than the best.
    choose = torch.zeros(1, K, 110, 7).uniform_(generator=rng)
    random = reference.choose_blocks(choose, torch.arange(110)[:, None], geometry)[0].transpose(0, 1)
    other = torch.cat([random, indices[110:]])
    worse = recalled_mass(q, k, other, packing, geometry, scale=0.25)
    groups = mass.unflatten(1, (K, 2)).sum(2) - worse.unflatten(1, (K, 2)).sum(2)
    assert (groups > -1e-5).all() and groups.max() > 0.1


def test_variants_and_mistakes(probe, model, attention, build):
    decoder, plain, run = probe
    named = variants(decoder.attention_config.geometry())
    assert list(named) == ["without compression", "without selection", "without window", "topk 8", "topk 16",
                           "oracle top 4", "full on selection's K/V"]
    for operator in named.values():
        assert run(operator).isfinite().all()
    assert torch.equal(run(None), plain)
    with pytest.raises(ValueError, match="'windows' is not one of compression, selection, window"):
        without("windows")
    with pytest.raises(ValueError, match="has no NSA layer"), switched(build(model(), attention("full")), full):
        pass
