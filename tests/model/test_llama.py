"""Full attention against an independent implementation: transformers' Llama with the same weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sieve.model.config import AttentionConfig, ModelConfig, RopeConfig, RopeScaling
from sieve.model.decoder import Decoder
from sieve.model.init import initialize

YARN = RopeScaling(factor=8.0, original_seq_len=32)


def pair(scaling=None, tie=False):
    ours = Decoder(
        ModelConfig(name="llama", num_layers=3, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim_qk=16,
                    head_dim_v=16, intermediate_size=96, norm_eps=1e-6, tie_embeddings=tie, init_std=0.08,
                    rope=RopeConfig(theta=1000.0, scaling=scaling)),
        AttentionConfig(type="full"), vocab_size=101,
    )
    initialize(ours, seed=3)
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    if scaling:
        rope |= {"rope_type": "yarn", "factor": scaling.factor,
                 "original_max_position_embeddings": scaling.original_seq_len}
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=256, rope_parameters=rope,
        tie_word_embeddings=tie, attn_implementation="eager",
    )).eval()
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
             "head.weight": "lm_head.weight"}

    def theirs_name(name):
        name = name.replace("attention_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm")
        return names.get(name) or "model." + name.replace("attention.", "self_attn.")

    weights = {theirs_name(n): w for n, w in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_logits(scaling, pack):
    ours, theirs = pair(scaling)
    torch.manual_seed(0)
    tokens = torch.randint(0, 101, (2, 70))
    with torch.no_grad():
        wanted, got = theirs(tokens).logits, ours.logits(tokens, pack([70, 70]))
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_loss_and_gradients_with_tied_embeddings(pack):
    ours, theirs = pair(tie=True)
    torch.manual_seed(0)
    tokens = torch.randint(0, 101, (2, 40))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    out = ours(tokens, labels, pack([40, 40]))
    wanted = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(out.loss_sum / 78, wanted, rtol=1e-5, atol=1e-6)
    (out.loss_sum / 78).backward()
    wanted.backward()
    pairs = (
        (ours.embed.weight, theirs.model.embed_tokens.weight),
        (ours.layers[1].attention.k_proj.weight, theirs.model.layers[1].self_attn.k_proj.weight),
        (ours.layers[0].mlp.up_proj.weight, theirs.model.layers[0].mlp.up_proj.weight),
        (ours.layers[2].mlp_norm.weight, theirs.model.layers[2].post_attention_layernorm.weight),
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
