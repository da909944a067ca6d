import pytest
import torch

from sieve.model.config import LossConfig

ATTENTION = [("full", {}), ("window", {}), ("nsa", {}), ("nsa", {"layers": ("nsa", "full"), "share_kv": True})]
HEALTH = {
    "gate_cmp", "gate_slc", "gate_win", "saturated_cmp", "saturated_slc", "saturated_win", "selected_distance",
    "forced_share", "selection_overlap", "selection_entropy", "never_selected",
}
LENGTHS = [87, 33, 70, 1, 65]


@pytest.fixture(params=ATTENTION, ids=["full", "window", "nsa", "mixed"])
def decoder(request, model, attention, build):
    kind, changes = request.param
    return build(model(), attention(kind, **changes))


def rows(tokens=256, vocab=61, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (batch, tokens // batch), generator=generator) for _ in range(2)]


def gradients(decoder, loss):
    decoder.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in decoder.named_parameters()}


def test_later_tokens_and_other_documents_move_no_bit(decoder, pack):
    """Attention of every type, router and experts included: the shapes of the experts' products do change."""
    packing, (tokens, _) = pack(LENGTHS), rows()
    with torch.no_grad():
        logits = decoder.logits(tokens, packing)[0]
        for cut in (1, 40, 86, 100, 130, 189, 200, 255):
            doc = packing.doc[cut]
            other = tokens.clone()
            other[0, cut:] = (other[0, cut:] + 1 + torch.arange(256 - cut) % 60) % 61
            first = packing.cu_seqlens[doc]
            other[0, :first] = (other[0, :first] + 7) % 61
            changed = decoder.logits(other, packing)[0]
            assert torch.equal(changed[first:cut], logits[first:cut])
            assert not torch.equal(changed[cut], logits[cut])


def test_packed_rows_equal_separate_documents(decoder, pack):
    packing, (tokens, labels) = pack(LENGTHS), rows()
    labels[0, ::5] = -100
    with torch.no_grad():
        logits = decoder.logits(tokens, packing)[0]
        packed = decoder(tokens, labels, packing, per_token=True)
        ce = 0
        for start, length in zip(packing.cu_seqlens.tolist(), LENGTHS):
            own = slice(start, start + length)
            alone = decoder.logits(tokens[:, own], pack([length]))[0]
            torch.testing.assert_close(logits[own], alone, rtol=1e-4, atol=1e-5)
            ce += decoder(tokens[:, own], labels[:, own], pack([length])).ce_sum
    torch.testing.assert_close(packed.ce_sum, ce, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(packed.token_loss.sum(), packed.ce_sum)


@pytest.mark.parametrize("mode", ["attention", "block", "full"])
def test_checkpointing_is_bit_equal(decoder, pack, mode):
    packing, (tokens, labels) = pack(LENGTHS), rows()
    loss = decoder(tokens, labels, packing).loss_sum
    plain = gradients(decoder, loss)
    decoder.set_activation_checkpointing(mode)
    again = decoder(tokens, labels, packing, collect=True)
    assert torch.equal(again.loss_sum, loss)
    for name, grad in gradients(decoder, again.loss_sum).items():
        assert torch.equal(grad, plain[name]), name


def test_every_parameter_gets_a_gradient(decoder, pack):
    tokens, labels = rows()
    for name, grad in gradients(decoder, decoder(tokens, labels, pack(LENGTHS)).loss_sum).items():
        assert grad.any() and grad.isfinite().all(), name


def test_output(decoder, pack):
    tokens, labels = rows(batch=2)
    labels[0, :100] = -100
    packing = pack([100, 28, 128])
    out = decoder(tokens, labels, packing)
    assert out.token_loss is None and out.health == {} and not out.ce_sum.requires_grad
    assert list(out.expert_load) == [1] and out.expert_load[1].sum() == 256 * 2 and not out.expert_load[1].requires_grad
    full = decoder(tokens, labels, packing, collect=True, per_token=True)
    assert torch.equal(full.loss_sum, out.loss_sum)
    assert full.token_loss.shape == (2, 128) and not full.token_loss[0, :100].any() and full.token_loss[1].all()
    types = decoder.attention_config.layer_types(2)
    assert set(full.health) == {f"nsa/layer_{i:02d}/{k}" for i in range(2) if types[i] == "nsa" for k in HEALTH}
    assert all(v.dim() == 0 and v.isfinite() for v in full.health.values())
    logits = decoder.logits(tokens, packing).flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(out.ce_sum, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(decoder, pack, autocast):
    packing, (tokens, labels) = pack(LENGTHS), rows()
    with torch.no_grad():
        exact = decoder(tokens, labels, packing).loss_sum
    if not autocast:
        decoder.bfloat16()
        assert decoder.layers[1].mlp.router.bias.dtype == torch.float32
    decoder.set_activation_checkpointing("block")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = decoder(tokens, labels, packing, collect=True)
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, exact, rtol=0.02, atol=0)
    for (name, p), grad in zip(decoder.named_parameters(), gradients(decoder, out.loss_sum).values()):
        assert grad.dtype == p.dtype and grad.isfinite().all(), name


def test_z_and_auxiliary_losses_add_to_the_loss_alone(model, moe, attention, build, pack):
    packing, (tokens, labels) = pack(LENGTHS), rows()
    labels[0, 50:] = -100
    plain = build(model(), attention("full"))(tokens, labels, packing)
    z = build(model(), attention("full"), loss=LossConfig(z_loss=0.1))(tokens, labels, packing)
    aux = build(model(moe=moe(balance="aux", aux_coef=0.5)), attention("full"))(tokens, labels, packing)
    assert torch.equal(plain.loss_sum, plain.ce_sum)
    assert torch.equal(z.ce_sum, plain.ce_sum) and z.loss_sum > plain.loss_sum
    torch.testing.assert_close(aux.ce_sum, plain.ce_sum)
    # One MoE layer: its loss is 0.5 when balanced, somewhat more when not, and counts for each of 50 labelled tokens.
    assert 0.5 * 50 * 0.99 < aux.loss_sum - aux.ce_sum < 0.5 * 50 * 1.5


def test_updating_the_router_bias(model, attention, build, pack):
    decoder = build(model(), attention("full"))
    tokens, labels = rows()
    load = decoder(tokens, labels, pack(LENGTHS)).expert_load
    decoder.update_router_bias(load)
    wanted = 1e-3 * torch.sign(load[1].mean() - load[1])
    torch.testing.assert_close(decoder.layers[1].mlp.router.bias, wanted)
    assert wanted.any()


@pytest.mark.parametrize("mode", ["none", "attention", "block", "full"])
def test_the_bias_by_scores(mode, model, moe, attention, build, pack):
    """A step's scores, taken once whatever the backward computes again, move the bias; no token moves none."""
    decoder = build(model(moe=moe(bias_update="quantile")), attention("full"))
    decoder.set_activation_checkpointing(mode)
    tokens, labels = rows()
    out = decoder(tokens, labels, pack(LENGTHS))
    kept = out.router_sample[1].clone()
    out.loss_sum.backward()
    assert list(out.router_sample) == [1] and kept.shape == (256, 4) and torch.equal(out.router_sample[1], kept)
    decoder.update_router_bias(out.expert_load, {1: torch.full_like(kept, torch.nan)})
    bias = decoder.layers[1].mlp.router.bias
    assert not bias.any()
    for _ in range(3):
        decoder.update_router_bias(out.expert_load, out.router_sample)
    assert bias.any() and abs(bias.sum().item()) < 1e-6
    after = decoder(tokens, labels, pack(LENGTHS)).expert_load[1]
    assert after.max() < 1.05 * after.mean() < out.expert_load[1].max()


def test_settling_balances_the_forward_itself(model, moe, attention, build, pack):
    decoder = build(model(num_layers=3, moe=moe(bias_update="quantile", num_experts=8)), attention("full")).eval()
    packing, (tokens, labels) = pack(LENGTHS), rows()
    seen = []

    def whole(sample):
        seen.append(sample)
        return sample

    with torch.no_grad(), decoder.settling(whole):
        load = decoder(tokens, labels, packing).expert_load
    assert len(seen) == 2
    biases = [layer.mlp.router.bias.clone() for layer in decoder.layers[1:]]
    with torch.no_grad():
        again = decoder(tokens, labels, packing).expert_load
    for index, bias in zip((1, 2), biases):
        assert load[index].max() < 1.3 * load[index].mean() and torch.equal(again[index], load[index])
        assert torch.equal(decoder.layers[index].mlp.router.bias, bias) and bias.any()
    with pytest.raises(ZeroDivisionError), decoder.settling(lambda sample: 1 / 0):
        decoder(tokens, labels, packing)
    assert all(layer.mlp.router.settle is None for layer in decoder.layers[1:])


def test_tied_weights_stay_tied(model, attention, build):
    with torch.device("meta"):
        from sieve.model.decoder import Decoder
        decoder = Decoder(model(tie_embeddings=True), attention(), 61)
    decoder.to_empty(device="cpu")
    assert decoder.head.weight is decoder.embed.weight
    decoder.bfloat16()
    assert decoder.head.weight is decoder.embed.weight and "head.weight" not in dict(decoder.named_parameters())
    untied = build(model(), attention())
    assert untied.head.weight is not untied.embed.weight


def test_users_mistakes(model, attention, build, pack):
    decoder = build(model(), attention("full"))
    with pytest.raises(ValueError, match="'blocks' is not one of none, attention, block, full"):
        decoder.set_activation_checkpointing("blocks")
    with pytest.raises(ValueError, match="packing lays out 20 tokens"):
        decoder.logits(torch.zeros(1, 21, dtype=torch.int64), pack([20]))
    with pytest.raises(ValueError, match="3 entries, which does not divide model.num_layers=2"):
        build(model(), attention(layers=("full", "nsa", "full")))
    with pytest.raises(ValueError, match="expert_size=20 is not divisible by 8.*16 or 24"):
        model(moe=dict(num_experts=2, top_k=1, expert_size=20))
    with pytest.raises(ValueError, match="hidden_size=36 is not divisible by 8"):
        model(hidden_size=36)


def test_plain_implementations_agree_and_decode(model, attention, build, pack):
    tokens, labels = rows()
    losses, last = [], []
    for impl in ("reference", "sdpa"):
        decoder = build(model(), attention("nsa", impl=impl))
        losses.append(decoder(tokens, labels, pack(LENGTHS)).loss_sum)
        cache = decoder.new_cache(1, 64)
        decoder.extend(tokens[0, :50], [50], cache)
        last.append(decoder.extend(tokens[0, 50:51], [1], cache))
        torch.testing.assert_close(last[-1][0], decoder.logits(tokens[:, :51], pack([51]))[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(last[0], last[1], rtol=1e-4, atol=1e-4)
