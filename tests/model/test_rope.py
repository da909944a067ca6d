import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sieve.model.config import RopeConfig, RopeScaling
from sieve.model.rope import attention_scale, frequencies, rotate, rotation

DIM = 24
YARN = RopeConfig(theta=5000.0, scaling=RopeScaling(factor=4.0, original_seq_len=64, beta_fast=4.0, beta_slow=0.5))


def theirs(rope: RopeConfig) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling:
        s = rope.scaling
        parameters |= {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original_seq_len,
                       "beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    return LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=2 * DIM, num_attention_heads=2, head_dim=DIM, max_position_embeddings=256,
        rope_parameters=parameters,
    ))


@pytest.mark.parametrize("rope", [RopeConfig(), YARN], ids=["plain", "yarn"])
def test_against_transformers(rope):
    torch.manual_seed(0)
    hf = theirs(rope)
    torch.testing.assert_close(frequencies(rope, DIM, torch.device("cpu")), hf.inv_freq, rtol=1e-6, atol=0)
    x, position = torch.randn(40, 3, DIM), torch.arange(7, 47, dtype=torch.int32)
    cos, sin = hf(x, position[None].long())
    wanted, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    # Theirs puts YaRN's temperature into q and k, ours into the scale.
    got = rotate(x, rotation(position, rope, DIM)) * (attention_scale(rope, DIM) * math.sqrt(DIM)) ** 0.5
    torch.testing.assert_close(got, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_yarn_blends_between_whole_and_stretched_frequencies():
    plain = frequencies(RopeConfig(theta=YARN.theta), DIM, torch.device("cpu"))
    ratio = frequencies(YARN, DIM, torch.device("cpu")) / plain
    torch.testing.assert_close(ratio[0], torch.tensor(1.0))
    torch.testing.assert_close(ratio[-1], torch.tensor(1 / 4.0))
    assert (ratio.diff() <= 0).all() and ((ratio > 0.26) & (ratio < 0.99)).any()
    assert attention_scale(YARN, DIM) == pytest.approx((0.1 * math.log(4) + 1) ** 2 / math.sqrt(DIM))


def test_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, DIM), torch.randn(1, 1, DIM)

    def score(t, s):
        turned = [rotate(x, rotation(torch.tensor([p]), RopeConfig(), DIM)) for x, p in ((q, t), (k, s))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(9, 4), score(4, 9))


def test_gradient_and_dtype():
    torch.manual_seed(0)
    table = tuple(t.double() for t in rotation(torch.arange(5), RopeConfig(), DIM))
    x = torch.randn(5, 2, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))
    half = x.detach().bfloat16()
    got = rotate(half, rotation(torch.arange(5), RopeConfig(), DIM))
    # fp32 inside: within one rounding to bf16 of the exact value.
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), rotate(half.double(), table), rtol=2**-8, atol=1e-5)
