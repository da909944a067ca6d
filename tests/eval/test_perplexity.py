from __future__ import annotations

import io
import math

import pytest
import sentencepiece
import torch

from sieve.eval.perplexity import PositionLoss, token_bytes


def test_sums_by_powers_of_two_of_the_position():
    total = PositionLoss(8, torch.tensor([0, 1, 2, 3]))
    # Two documents of 5 and 3 tokens: positions 1..5 and 1..3.
    position = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], dtype=torch.int32)
    loss = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 6.0, 7.0, 0.0]])
    labels = torch.tensor([[1, 2, 3, 1, -100, 2, 3, -100]])
    total.add(loss, labels, position)
    total.add(loss, labels, position)
    found = total.metrics()
    assert found == pytest.approx({
        "eval/loss": 23 / 6, "eval/bits_per_byte": 23 / math.log(2) / 12,
        "eval/loss_pos_0001": 3.5, "eval/loss_pos_0002": 4.0, "eval/loss_pos_0004": 4.0,
    })
    assert total.sums[1].tolist() == [4, 6, 2, 0]  # no token is lost, and position 8 has none


@pytest.mark.parametrize("seq_len", [1, 2, 3, 4, 63, 64, 65])
def test_every_position_has_a_bucket(seq_len):
    total = PositionLoss(seq_len, torch.ones(1, dtype=torch.int64))
    total.add(torch.ones(1, seq_len), torch.zeros(1, seq_len, dtype=torch.int64), torch.arange(seq_len))
    expected = [0] * seq_len.bit_length()
    for position in range(1, seq_len + 1):
        expected[int(math.log2(position))] += 1
    assert total.sums[1].tolist() == expected


def test_bytes_of_tokens_add_up_to_the_text():
    text = "the quick brown fox, jumps over the lazy dog \u00e4\u00f6 " * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )
    sizes = token_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for sample in (text, "fox\u20acdog \U0001f600", "  two  spaces"):
        assert sizes[processor.encode(sample)].sum().item() == len(sample.encode())
    assert sizes[[processor.bos_id(), processor.eos_id(), processor.unk_id()]].tolist() == [0, 0, 0]
