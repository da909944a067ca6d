"""Full-attention decoders to Llama and Qwen3 and back: equal logits; Llama continued with NSA."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from sieve.model.config import RopeConfig, RopeScaling
from sieve.model.llama import from_llama, to_llama

YARN = RopeConfig(theta=1000.0, scaling=RopeScaling(factor=4.0, original_seq_len=32, beta_fast=16.0))


class OnlyWindow(torch.nn.Module):
    """Gates before the sigmoid, [T, heads * 3]: compression and selection shut, the window open."""

    def forward(self, x):
        return torch.tensor([-1e4, -1e4, 1e4]).repeat(4).expand(x.shape[0], -1)


def tokens(n=70, vocab=61):
    return torch.randint(0, vocab, (1, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("rope, tie", [(RopeConfig(), False), (YARN, True)], ids=["plain", "yarn-tied"])
def test_there_and_back(model, attention, build, pack, tmp_path, qk_norm, rope, tie):
    ours = build(model(moe=None, head_dim_qk=8, rope=rope, tie_embeddings=tie), attention("full", qk_norm=qk_norm))
    to_llama(ours, max_position_embeddings=128, eos_token_id=2).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == ("qwen3" if qk_norm else "llama")
    back = from_llama(theirs)
    assert back.config.model_copy(update={"name": "test", "init_std": 0.15}) == ours.config
    with torch.no_grad():
        want = ours.logits(tokens(), pack([70]))
        torch.testing.assert_close(theirs(tokens()).logits, want, rtol=0, atol=1e-5)
        assert torch.equal(back.logits(tokens(), pack([70])), want)


def test_a_public_model_continued_with_nsa(attention, pack):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )).bfloat16()
    ours = from_llama(theirs, attention("nsa"))
    layer = ours.layers[1].attention
    assert ours.embed.weight.dtype == torch.bfloat16
    wanted = theirs.model.layers[1].self_attn
    for branch in ("k_proj", "k_cmp_proj", "k_win_proj"):
        assert torch.equal(getattr(layer, branch).weight, wanted.k_proj.weight)
    assert torch.equal(layer.v_win_proj.weight, wanted.v_proj.weight)
    with torch.no_grad():
        assert ours.logits(tokens(), pack([70])).isfinite().all()
        # With the window's gate alone open, a text of its width gives what Llama makes of it.
        for block in ours.float().layers:
            block.attention.gate = OnlyWindow()
        got, wanted = ours.logits(tokens(12), pack([12])), theirs.float()(tokens(12)).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_what_cannot_be(model, attention, build):
    for decoder, reason in (
        (build(model(moe=None), attention("nsa")), "attention=nsa"),
        (build(model(head_dim_qk=8), attention("full")), "experts"),
        (build(model(moe=None), attention("full")), "head_dim_qk=12 is not model.head_dim_v=8"),
        (build(model(moe=None, head_dim_qk=8), attention("full", output_gate=True)), "output gates"),
    ):
        with pytest.raises(ValueError, match=f"cannot be a Llama.*{reason}"):
            to_llama(decoder, max_position_embeddings=64)
    small = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="type mistral cannot be imported"):
        from_llama(MistralForCausalLM(MistralConfig(**small, num_key_value_heads=2)))
    with pytest.raises(ValueError, match="attention_bias"):
        from_llama(LlamaForCausalLM(LlamaConfig(**small, attention_bias=True)))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_parameters .*linear.* cannot be imported"):
        from_llama(LlamaForCausalLM(LlamaConfig(**small, rope_parameters=rope)))
