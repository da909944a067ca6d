"""The transformers model: round trips through a folder, generation with our cache, padding, a clean process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from sieve.model.config import AttentionConfig
from sieve.model.hf import SieveForCausalLM
from sieve.model.init import initialize

KINDS = {"nsa": {}, "full": {"tie_embeddings": True}, "window": {}}


@pytest.fixture(params=list(KINDS))
def decoder(request, model, attention, build):
    made = build(model(**KINDS[request.param]), attention(request.param))
    made.layers[1].mlp.router.bias.copy_(torch.tensor([0.3, -0.1, 1e-4, 0.0]))
    return made


@pytest.fixture
def folder(decoder, tmp_path):
    SieveForCausalLM.of(decoder, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path)
    return tmp_path


def padded(lengths, left, vocab=61):
    rng = torch.Generator().manual_seed(0)
    longest = max(lengths)
    tokens = torch.randint(3, vocab, (len(lengths), longest), generator=rng)
    column = torch.arange(longest)
    kept = [(column >= longest - n) if left else (column < n) for n in lengths]
    mask = torch.stack(kept).long()
    return tokens * mask, mask


def test_round_trip(decoder, folder, pack):
    names = set(safetensors.torch.load_file(folder / "model.safetensors"))
    own = set(decoder.state_dict()) - ({"head.weight"} if decoder.config.tie_embeddings else set())
    assert names == own
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert again.model.config == decoder.config and again.model.attention_config == decoder.attention_config
    for (name, mine), theirs in zip(decoder.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(mine, theirs), name
    tokens, _ = padded([70], left=True)
    with torch.no_grad():
        want = decoder.logits(tokens, pack([70]))
        assert torch.equal(again(tokens, use_cache=False).logits, want)
        assert torch.equal(again(tokens).logits, want)
        torch.testing.assert_close(again(tokens, logits_to_keep=3).logits, want[:, -3:])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_takes_no_part(decoder, folder, pack, left):
    again = AutoModelForCausalLM.from_pretrained(folder)
    tokens, mask = padded([70, 33, 8], left)
    for use_cache in (False, True):
        with torch.no_grad():
            logits = again(tokens, attention_mask=mask, use_cache=use_cache).logits
            for row, n in enumerate([70, 33, 8]):
                alone = decoder.logits(tokens[row, mask[row].bool()][None], pack([n]))[0]
                torch.testing.assert_close(logits[row, mask[row].bool()], alone, rtol=1e-4, atol=1e-5)


def test_generate_with_and_without_cache(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens, mask = padded([60, 33, 8], left=True)
    for how in (dict(do_sample=False), dict(num_beams=3), dict(do_sample=True, top_p=0.9, num_return_sequences=2)):
        runs = []
        for more in (dict(), dict(use_cache=False), dict(prefill_chunk_size=25) if "num_beams" not in how else dict()):
            torch.manual_seed(0)
            if more.get("prefill_chunk_size"):
                from sieve.model.hf import SieveCache

                rows = 3 * how.get("num_return_sequences", 1)
                more["past_key_values"] = SieveCache(model.model.new_cache(rows, 1))
            runs.append(model.generate(tokens, attention_mask=mask, max_new_tokens=12, **how, **more))
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("size", [80, 40])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resized_vocabulary(decoder, folder, tmp_path, pack, size, mean_resizing):
    model, kept = AutoModelForCausalLM.from_pretrained(folder), min(size, 61)
    before, tied = {name: value.clone() for name, value in decoder.state_dict().items()}, decoder.config.tie_embeddings
    assert model.resize_token_embeddings(61) is model.model.embed and model.vocab_size == 61
    assert model.resize_token_embeddings(size, mean_resizing=mean_resizing) is model.model.embed
    assert model.config.vocab_size == model.model.vocab_size == model.vocab_size == model.model.embed.num_embeddings == size
    assert (model.model.head.weight is model.model.embed.weight) == tied
    for name in ("embed", "head"):
        weight = getattr(model.model, name).weight
        assert torch.equal(weight[:kept], before[f"{name}.weight"][:kept])
        assert weight.shape == (size, 32) and weight.isfinite().all() and weight.requires_grad
    tokens = padded([20], left=True, vocab=40)[0]
    model.train()(tokens, labels=tokens).loss.backward()
    assert model.model.head.weight.grad.shape == (size, 32)
    model.eval().save_pretrained(tmp_path / "resized")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "resized", output_loading_info=True)
    assert not any(info.values()) and again.config.vocab_size == again.model.vocab_size == size
    with torch.no_grad():
        logits = again(tokens).logits
        assert torch.equal(logits, model(tokens).logits) and logits.shape[-1] == size
        torch.testing.assert_close(logits[..., :kept], decoder.logits(tokens, pack([20]))[..., :kept])
    assert model.resize_token_embeddings(size + 1, pad_to_multiple_of=16).num_embeddings == -(-(size + 1) // 16) * 16


def test_generate_takes_padding_at_the_left_alone(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens, mask = padded([20, 8], left=False)
    for more in (dict(), dict(use_cache=False)):
        with pytest.raises(ValueError, match=r"ends in padding in rows \[1\].*pad on the left"):
            model.generate(tokens, attention_mask=mask, max_new_tokens=3, **more)
    with pytest.raises(ValueError, match=r"ends in padding in rows \[1\].*pad on the left"):
        model.generate(tokens, max_new_tokens=3)  # told by pad_token_id alone
    # A row that ended in an earlier turn has holes in its mask, which do no harm.
    gap = torch.ones_like(mask)
    gap[1, 8:15] = 0
    assert model.generate(tokens, attention_mask=gap, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_what_cannot_be_given_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens, _ = padded([20], left=True)
    generate = functools.partial(model.generate, max_new_tokens=2, return_dict_in_generate=True)
    for call in (functools.partial(generate, tokens), functools.partial(model, tokens)):
        with pytest.raises(ValueError, match="past_key_values is a DynamicCache.*leave it out"):
            call(past_key_values=DynamicCache())
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ValueError, match=f"{name}=True: this model keeps none"):
                call(**{name: True})
            call(**{name: False})
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        model(tokens)
    model(tokens, output_hidden_states=False)


def test_a_cache_that_is_not_given_is_told(folder, monkeypatch):
    told = []
    monkeypatch.setattr("sieve.model.hf.log.warning_once", told.append)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens, _ = padded([20], left=True)
    assert model(tokens).past_key_values is None and not told  # nobody asked
    with torch.no_grad():
        assert model(tokens, use_cache=True).past_key_values.get_seq_length() == 20 and not told
    assert model(tokens, use_cache=True).past_key_values is None
    assert model.train()(tokens, labels=tokens, use_cache=True).past_key_values is None
    assert len(told) == 2 and all("use_cache=True gives no past_key_values" in text for text in told)


def test_loss_and_gradients(decoder, folder, pack):
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    tokens, _ = padded([40], left=True)
    out = model(tokens, labels=tokens)
    labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)
    torch.testing.assert_close(out.loss, decoder(tokens, labels, pack([40])).ce_sum / 39)
    out.loss.backward()
    assert model.model.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_bf16_keeps_the_router_s_bias(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.router.bias.tolist() == pytest.approx([0.3, -0.1, 1e-4, 0.0])


def test_a_new_model_starts_as_in_training(decoder):
    fresh = SieveForCausalLM(SieveForCausalLM.of(decoder).config).model
    initialize(decoder, 0)
    for (name, mine), theirs in zip(decoder.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(mine, theirs), name


@pytest.mark.slow  # a process without compiled bytecode takes half a minute to import transformers
def test_loads_in_a_clean_process(model, attention, build, tmp_path):
    """From another directory, with nothing imported but sieve's own file."""
    folder = tmp_path
    SieveForCausalLM.of(build(model(), attention())).save_pretrained(folder)
    code = (
        "import sys, torch, sieve.model.hf; from transformers import AutoModelForCausalLM as A; "
        f"print(A.from_pretrained({str(folder)!r})(torch.arange(3, 40)[None]).logits.double().sum().item()); "
        "assert not [m for m in sys.modules if m.startswith(('sieve.train', 'sieve.data', 'deepspeed', 'hydra'))]"
    )
    source = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": source})
    assert done.returncode == 0, done.stderr
    here = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 40)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(here, rel=1e-6)


def test_users_mistakes(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens, mask = padded([20], left=True)
    with pytest.raises(ValueError, match="position_ids do not count the tokens"):
        model(tokens, position_ids=torch.arange(5, 25)[None])
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, past \+ 20\]"):
        model(tokens, attention_mask=mask[:, :7])
    config = json.loads((folder / "config.json").read_text())
    config["attention"]["topk"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="topk=1 must be at least"):
        AutoModelForCausalLM.from_pretrained(folder)
    del config["model"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json of a sieve model needs `model`"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_implementation_is_not_saved(model, attention, build):
    made = SieveForCausalLM.of(build(model(), attention(impl="reference")))
    assert AttentionConfig(**made.config.attention).impl == "auto"
