import math

import pytest
import torch

from sieve.model import init
from sieve.model.decoder import Decoder
from sieve.model.init import drawn, initialize


def test_twins_share_every_weight_of_equal_name_and_shape(model, attention, build):
    full = dict(build(model(), attention("full", output_gate=True, qk_norm=True)).named_parameters())
    nsa = dict(build(model(), attention("nsa", qk_norm=True)).named_parameters())
    shared = full.keys() & nsa.keys()
    assert set(full) - shared == {f"layers.{i}.attention.output_gate.weight" for i in range(2)}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {n.split(".")[-2] for n in shared if "attention." in n}
    only_nsa = {n.split(".", 3)[3] for n in set(nsa) - shared}
    assert only_nsa == {
        "gate.weight", "k_cmp_proj.weight", "v_cmp_proj.weight", "k_win_proj.weight", "v_win_proj.weight",
        "k_cmp_norm.weight", "k_win_norm.weight",
        *(f"{p}_phi.{w}" for p in "kv" for w in ("position", "w_in", "w_out")),
    }
    assert all(torch.equal(full[n], nsa[n]) for n in shared)


def test_other_names_seeds_and_layers_get_other_values(model, attention, build):
    one, two = (dict(build(model(), attention(), seed=s).named_parameters()) for s in (0, 1))
    again = dict(build(model(), attention(), seed=0).named_parameters())
    for name, value in one.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, two[name]) == (name.endswith(("norm.weight", "position")))
    attention_0 = one["layers.0.attention.k_proj.weight"]
    for name in ("layers.1.attention.k_proj.weight", "layers.0.attention.k_win_proj.weight"):
        assert not torch.equal(attention_0, one[name])


def test_deviations(model, moe, attention, build):
    config = model(hidden_size=128, num_layers=8, intermediate_size=256, moe=moe(expert_size=64))
    decoder = build(config, attention(), vocab=400)
    std = {n: p.std().item() for n, p in decoder.named_parameters()}
    for name in ("embed.weight", "head.weight", "layers.3.attention.q_proj.weight", "layers.2.attention.gate.weight",
                 "layers.0.mlp.up_proj.weight", "layers.2.mlp.shared.gate_proj.weight", "layers.5.mlp.experts.gate_up"):
        assert std[name] == pytest.approx(0.15, rel=0.05), name
    for name in ("layers.3.attention.o_proj.weight", "layers.0.mlp.down_proj.weight", "layers.5.mlp.experts.down",
                 "layers.2.mlp.shared.down_proj.weight"):
        assert std[name] == pytest.approx(0.15 / math.sqrt(16), rel=0.05), name
    assert all((p == 1).all() for n, p in decoder.named_parameters() if n.endswith("norm.weight"))


@pytest.mark.parametrize("tie", [False, True])
def test_from_the_meta_device_and_in_half_precision(model, attention, build, tie):
    config = model(tie_embeddings=tie)
    with torch.device("meta"):
        decoder = Decoder(config, attention(), 61)
    decoder = decoder.bfloat16().to_empty(device="cpu")
    initialize(decoder, seed=0)
    wanted = build(config, attention()).state_dict()
    got = decoder.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert torch.equal(value.float(), wanted[name].to(value.dtype).float()), name
    assert (decoder.layers[1].mlp.router.bias == 0).all()


def test_weights_are_unusable_before_initialisation(model, attention):
    decoder = Decoder(model(), attention(), 61)
    assert decoder.head.weight.isnan().all() and decoder.layers[1].mlp.experts.down.isnan().all()


def test_the_residual_stream_starts_calm(model, attention, build, pack):
    """A fresh model predicts about evenly."""
    decoder = build(model(init_std=0.02), attention())
    tokens = torch.randint(0, 61, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = decoder(tokens, tokens.roll(1), pack([120])).ce_sum / 120
    assert loss == pytest.approx(math.log(61), abs=0.1)


@pytest.mark.parametrize("ahead", [1, 10, 2**28])
def test_values_are_drawn_ahead_in_their_order(ahead, monkeypatch):
    monkeypatch.setattr(init, "AHEAD", ahead)
    made = []

    def value(name, shape):
        made.append(name)
        return torch.full(shape, float(name))

    taken = []
    for found in drawn(((str(i), torch.Size([i % 3, 4])) for i in range(100)), value):
        taken.append(found.flatten()[0].item() if found.numel() else None)
        waiting = [int(name) % 3 * 4 for name in made if int(name) >= len(taken)]
        assert sum(waiting) <= max(ahead, 8)
    assert taken == [float(i) if i % 3 else None for i in range(100)]


def test_what_goes_wrong_in_a_thread_is_raised():
    def value(name, shape):
        raise ValueError(f"{name} has no value")

    with pytest.raises(ValueError, match="a has no value"):
        list(drawn([("a", torch.Size([1]))], value))
