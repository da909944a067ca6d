"""Small decoders for the tests of evaluation."""

import pytest
import torch

from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.decoder import Decoder
from sieve.model.init import initialize


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """tiny(type, vocab, **attention): a random decoder whose next token is not the same everywhere."""

    def tiny(type="nsa", vocab=61, seed=0, **changes):
        model = ModelConfig(name="tiny", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim_qk=12,
                            head_dim_v=8, intermediate_size=48, init_std=0.3)
        geometry = dict(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)
        decoder = Decoder(model, AttentionConfig(type=type, **(geometry | changes)), vocab)
        initialize(decoder, seed)
        return decoder.eval()

    return tiny
