from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from sieve.kernels.nsa.geometry import Geometry
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.count import (
    compressed_pairs,
    count_parameters,
    dense_flops_per_token,
    flops_per_token,
    selected_pairs,
    window_pairs,
)
from sieve.model.decoder import Decoder

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml"))
ATTENTION = sorted(p.stem for p in (CONFIGS / "attention").glob("*.yaml"))


def shipped(group, name, cls):
    return cls(**yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text()))


def built(model, attention, vocab):
    with torch.device("meta"):
        return Decoder(model, attention, vocab)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
def test_formula_equals_the_built_model(name, attention):
    model, attention = shipped("model", name, ModelConfig), shipped("attention", attention, AttentionConfig)
    decoder = built(model, attention, 1000)
    count = count_parameters(model, attention, 1000)
    parameters = dict(decoder.named_parameters())
    assert count.total == sum(p.numel() for p in parameters.values()) == sum(count.by_part.values())
    experts = [p for n, p in parameters.items() if ".experts." in n]
    visited = sum(p.numel() // model.moe.num_experts * model.moe.top_k for p in experts)
    assert count.active == count.total - sum(p.numel() for p in experts) + visited
    assert count.by_part.get("phi", 0) == sum(p.numel() for n, p in parameters.items() if "_phi." in n)
    assert count.by_part.get("gates", 0) == sum(p.numel() for n, p in parameters.items() if "gate.weight" in n)


@pytest.mark.parametrize("changes", [
    {"qk_norm": True}, {"qk_norm": True, "share_kv": True}, {"phi": "linear"}, {"phi": "mean"}, {"phi_hidden": 5},
    {"type": "full", "qk_norm": True, "output_gate": True},
    {"layers": ("full", "nsa"), "qk_norm": True, "output_gate": True},
], ids=str)
def test_formula_with_every_option(model, attention, changes):
    model, attention = model(), attention(**changes)
    total = sum(p.numel() for p in built(model, attention, 61).parameters())
    assert count_parameters(model, attention, 61).total == total


def test_the_papers_model():
    """arXiv 2502.11089, section 4.1: 27B parameters.

    Its 3B active cannot be all a token meets: 64 heads of 192 and 128 alone make 2.0B of attention. It is what the
    rest of the layers and the output layer come to.
    """
    count = count_parameters(shipped("model", "nsa-27b", ModelConfig), AttentionConfig(type="nsa"), 102_400)
    assert count.total == pytest.approx(27e9, rel=0.05)
    around = sum(count.by_part[part] for part in ("embedding", "projections", "gates", "phi"))
    assert count.active - around == pytest.approx(3e9, rel=0.05)
    assert count.active == pytest.approx(5.23e9, rel=0.01)


@pytest.mark.parametrize("name, total", [("tiny", 9.74e6), ("small", 113e6), ("base", 344e6), ("1b", 1.27e9)])
def test_sizes_of_the_presets(name, total):
    count = count_parameters(shipped("model", name, ModelConfig), AttentionConfig(type="nsa"), 32768)
    assert count.total == pytest.approx(total, rel=0.02)


def test_the_mixture_and_its_dense_twin_have_equal_active_parameters():
    moe, dense = (
        count_parameters(shipped("model", name, ModelConfig), AttentionConfig(type="full"), 32768)
        for name in ("moe-1b", "dense-200m")
    )
    assert moe.total == pytest.approx(1.06e9, rel=0.01) and moe.active == pytest.approx(197e6, rel=0.01)
    assert dense.total == dense.active == moe.active - moe.by_part["router"]
    assert moe.by_part["router"] < 0.005 * moe.active


def test_configs_override_and_do_not_repeat_defaults():
    for group, cls in (("model", ModelConfig), ("attention", AttentionConfig)):
        for path in (CONFIGS / group).glob("*.yaml"):
            written = yaml.safe_load(path.read_text())
            repeated = {k for k, v in written.items() if cls.model_fields[k].default == v} - {"type"}
            assert not repeated, f"{path.name} repeats defaults: {repeated}"
            if group == "model":
                assert written["name"] == path.stem


GEOMETRIES = [
    Geometry(32, 16, 64, 16, 1, 2, 512), Geometry(8, 4, 16, 4, 1, 2, 12), Geometry(4, 4, 4, 3, 0, 1, 1),
    Geometry(6, 2, 8, 5, 2, 3, 100),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 31, 32, 33, 64, 300, 1027])
def test_pairs_by_summation(geometry, length):
    """Position by position, from the definitions."""
    l, d, size = geometry.kernel_size, geometry.kernel_stride, geometry.block_size
    cmp = slc = win = 0
    for t in range(length):
        cmp += sum(i * d + l - 1 <= t for i in range(length // d + 1))
        candidates = t // size + 1
        chosen = min(candidates, geometry.topk)  # the current block among them
        slc += (chosen - 1) * size + t % size + 1
        win += min(t + 1, geometry.window_size)
    assert compressed_pairs(length, geometry) == cmp
    assert selected_pairs(length, geometry) == slc
    assert window_pairs(length, geometry.window_size) == win


@pytest.mark.parametrize("changes", [
    {}, {"phi": "linear", "share_kv": True}, {"layers": ("full", "window"), "output_gate": True},
], ids=str)
@pytest.mark.parametrize("length", [7, 130])
def test_flops_by_summation(model, attention, changes, length):
    """A document of `length` tokens, summed over its positions, heads and blocks."""
    model, config = model(), attention(**changes)
    flops = {part: value * length for part, value in flops_per_token(model, config, 61, length).items()}
    H, G, Dk, Dv, hidden = 4, 2, 12, 8, 32
    l, d, size, w = config.kernel_size, config.kernel_stride, config.block_size, config.window_size
    wanted = dict.fromkeys(flops, 0.0)
    for kind in config.layer_types(2):
        for t in range(length):
            kv = 3 if kind == "nsa" and not config.share_kv else 1
            wanted["projections"] += 6 * hidden * (H * Dk + H * Dv + kv * G * (Dk + Dv))
            if kind == "nsa":
                seen = sum(i * d + l - 1 <= t for i in range(length))
                chosen = min(t // size + 1, config.topk)
                for part, keys in (("cmp", seen), ("slc", (chosen - 1) * size + t % size + 1), ("win", min(t + 1, w))):
                    wanted[part] += sum(6 * keys * (Dk + Dv) for _ in range(H))
                # Heads are added up per visible block, then 3 overlapping ones (l = 2d, l' = 4d: 5) per candidate.
                wanted["scores"] += seen * H + sum(2 * 5 * G for _ in range(t // size + 1))
                wanted["gates"] += 6 * hidden * 3 * H + 6 * 3 * H * Dv
            else:
                wanted[kind] += 6 * H * (Dk + Dv) * (min(t + 1, w) if kind == "window" else t + 1)
                wanted["gates"] += 6 * hidden * H + 3 * H * Dv
        if kind == "nsa":
            for _ in range(sum(i * d + l <= length for i in range(length))):  # blocks
                for D in (Dk, Dv):
                    mlp = l * D * 2 * D + 2 * D * D
                    wanted["phi"] += 6 * G * (mlp if config.phi == "mlp" else l * D * D)
    wanted["mlp"] = length * 6 * 3 * hidden * 48
    wanted["experts"], wanted["shared"] = length * 6 * 3 * hidden * 16 * 2, length * 6 * 3 * hidden * 16
    wanted["router"], wanted["lm_head"] = length * 6 * hidden * 4, length * 6 * hidden * 61
    assert flops == pytest.approx(wanted, rel=1e-9)


def test_flops_of_a_forward_as_torch_counts_them(model, attention, build, pack):
    model, config = model(moe=None), attention("full", impl="reference")
    decoder = build(model, config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.logits(torch.zeros(1, 64, dtype=torch.int64), pack([64]))
    flops = flops_per_token(model, config, 61, 64)
    attended = flops.pop("full")
    square = attended * 64 / ((64 + 1) / 2)  # the dense reference does not skip the hidden half
    assert counter.get_total_flops() == pytest.approx(64 * (sum(flops.values()) + square) / 3)


def test_dense_equivalent(model, attention):
    model, nsa = model(), attention("nsa")
    assert dense_flops_per_token(model, nsa, 61, 500) == flops_per_token(model, attention("full"), 61, 500)
    mixed = attention("nsa", layers=("nsa", "full"))
    assert dense_flops_per_token(model, mixed, 61, 500) == flops_per_token(model, attention("full"), 61, 500)


def test_keys_a_query_sees_at_64k():
    """The mean over a document. 1016 selected tokens are read, 31 of which, in the current block, are yet to come."""
    S, geometry = 65536, AttentionConfig().geometry()
    pairs = compressed_pairs(S, geometry), selected_pairs(S, geometry), window_pairs(S, 512), window_pairs(S, S)
    assert [p / S for p in pairs] == pytest.approx([2047, 1016 - 31, 510, 32768.5], abs=1)


def test_an_nsa_layer_counts_as_full_up_to_dense_len(model, attention):
    model, full = model(), attention("full")
    config = attention("nsa", dense_len=500, output_gate=True)
    assert flops_per_token(model, config, 61, 500) == flops_per_token(model, full, 61, 500)
    assert flops_per_token(model, config, 61, 501) == flops_per_token(model, attention("nsa"), 61, 501)
    assert count_parameters(model, config, 61) == count_parameters(model, attention("nsa"), 61)
