"""On the GPU the same model runs other code: Triton or varlen attention, CUTLASS grouped products, Liger's loss."""

import pytest
import torch

from sieve.kernels.nsa.layout import Packing
from sieve.model.config import AttentionConfig, ModelConfig, MoEConfig
from sieve.model.decoder import Decoder
from sieve.model.init import initialize

LENGTHS = [300, 1, 500, 223]
pytestmark = pytest.mark.gpu


def packing_on(device):
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return Packing.of(ends, sum(LENGTHS), max(LENGTHS))


@pytest.fixture(params=["full", "window", "nsa"])
def decoder(request):
    config = ModelConfig(
        name="gpu", num_layers=2, hidden_size=256, num_heads=16, num_kv_heads=1, head_dim_qk=64, head_dim_v=64,
        intermediate_size=512, moe=MoEConfig(num_experts=8, top_k=2, expert_size=128, num_shared=1), init_std=0.06,
    )
    attention = AttentionConfig(type=request.param, topk=4, window_size=128)
    decoder = Decoder(config, attention, 1000)
    initialize(decoder, 0)
    return decoder


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 1000, (1, sum(LENGTHS)), generator=generator) for _ in range(2)]


def gradients(decoder, rows, device):
    decoder.zero_grad()
    out = decoder(*(r.to(device) for r in rows), packing_on(device), collect=True)
    out.loss_sum.backward()
    return out, {n: p.grad.clone() for n, p in decoder.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_on_cuda_against_fp32_on_the_cpu(decoder, rows, autocast):
    wanted, exact = gradients(decoder, rows, "cpu")
    decoder.to("cuda", None if autocast else torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got, grads = gradients(decoder, rows, "cuda")
    torch.testing.assert_close(got.loss_sum.cpu(), wanted.loss_sum, rtol=5e-3, atol=0)
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.any(), name
    # Routing and selection differ where bf16 makes ties, so single weights may; the whole points the same way.
    a, b = (torch.cat([g[n].float().cpu().flatten() for n in exact]) for g in (grads, exact))
    assert torch.cosine_similarity(a, b, dim=0) > 0.98


@pytest.mark.parametrize("decoder", ["window", "nsa"], indirect=True)  # FlashAttention-2's dq differs from run to run
def test_two_runs_are_bit_equal(decoder, rows):
    decoder.to("cuda", torch.bfloat16)
    (one, first), (two, second) = (gradients(decoder, rows, "cuda") for _ in range(2))
    assert torch.equal(one.loss_sum, two.loss_sum)
    assert not [n for n in first if not torch.equal(first[n], second[n])]


def test_later_tokens_move_no_bit(decoder, rows):
    decoder.to("cuda", torch.bfloat16)
    tokens, packing = rows[0].cuda(), packing_on("cuda")
    with torch.no_grad():
        logits = decoder.logits(tokens, packing)[0]
        for cut in (1, 299, 450, 801, 1000):
            other = tokens.clone()
            other[0, cut:] = (other[0, cut:] + 1) % 1000
            assert torch.equal(decoder.logits(other, packing)[0, :cut], logits[:cut])


def test_a_forward_and_backward_wait_for_nothing(decoder, rows):
    """No host sync in the model itself: a step is queued while the last one runs."""
    decoder.to("cuda", torch.bfloat16)
    tokens, labels, packing = rows[0].cuda(), rows[1].cuda(), packing_on("cuda")
    decoder(tokens, labels, packing).loss_sum.backward()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder(tokens, labels, packing).loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
