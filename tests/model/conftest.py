"""Small decoders and packings for the model's tests: on the CPU, in fp32, one thread."""

import itertools

import pytest
import torch

from sieve.kernels.nsa.layout import Packing
from sieve.model.config import AttentionConfig, ModelConfig, MoEConfig
from sieve.model.decoder import Decoder
from sieve.model.init import initialize

GEOMETRY = dict(kernel_size=8, kernel_stride=4, block_size=16, topk=4, init_blocks=1, local_blocks=2, window_size=12)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def attention():
    """attention(type, **changes): a sparse pattern small enough that 100 tokens leave blocks unselected."""
    return lambda type="nsa", **changes: AttentionConfig(type=type, **(GEOMETRY | changes))


@pytest.fixture
def moe():
    return lambda **changes: MoEConfig(**(dict(num_experts=4, top_k=2, expert_size=16, num_shared=1) | changes))


@pytest.fixture
def model(moe):
    """model(**changes): two layers (the second a mixture of experts), 4 heads on 2 KV heads, head sizes 12 and 8."""
    sizes = dict(name="test", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim_qk=12, head_dim_v=8,
                 intermediate_size=48, moe=moe(), init_std=0.15)
    return lambda **changes: ModelConfig(**(sizes | changes))


@pytest.fixture
def build():
    """build(model, attention): an initialised Decoder."""

    def build(model, attention, vocab=61, seed=0, **kwargs):
        decoder = Decoder(model, attention, vocab, **kwargs)
        initialize(decoder, seed)
        return decoder

    return build


@pytest.fixture
def pack():
    """pack(lengths): a Packing of documents of these lengths."""

    def pack(lengths):
        ends = list(itertools.accumulate(lengths, initial=0))
        return Packing.of(torch.tensor(ends, dtype=torch.int32), ends[-1], max(lengths))

    return pack
