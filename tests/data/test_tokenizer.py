"""Every string comes back, nothing is unknown, training is repeatable, and mistakes are explained."""

import random

import numpy as np
import pytest
import sentencepiece

from sieve.data.config import TokenizerConfig
from sieve.data.tokenizer import PIECE_CHARS, Tokenizer, cut, train

AWKWARD = [
    "", " ", "  ", "\n", "\n\n\n", "\t\tx\t", "\r\n\r\n", " lead", "trail ", "  both  ", "a  b   c",
    "def f(x):\n\treturn x\n", "if a:\r\n    b()\r\n", "\x01\x02\x0b\x0c\x1b\x7f\x85", "nul\0nul",
    "<s>", "</s>", "<pad><unk>", "<0x41>", "a<s>b</s>",
    "\u2581", "a \u2581 b", "\u2581\u2581x \u2581", "\n\u2581\n",
    "😀👩\u200d👩\u200d👧", "naïve café", "e\u0301 \u00e9", "漢字かな", "\u00a0\u2003\u3000", "\u202eabc",
    "\u2028\u2029\ufeff\ufffd", "\U0010ffff\ue000", "1234567890", "x = 0x1F  # ½",
]


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_round_trip(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert 0 not in ids


def test_round_trip_of_random_text(tokenizer):
    draw = random.Random(0)
    alphabet = "ab \n\t\r\u2581é漢😀<>0_" + "".join(map(chr, range(1, 32)))
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(200))) for _ in range(300)]
    for text, ids in zip(texts, tokenizer.encode(texts, threads=2)):
        assert tokenizer.decode(ids) == text and 0 not in ids


def test_round_trip_of_long_lines_and_texts(tokenizer, texts):
    for text in ("x" * (2 * PIECE_CHARS + 3), "long " * PIECE_CHARS, "".join(texts) * 9, "é\n" * PIECE_CHARS):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text


def test_trained_text_is_shorter_than_its_bytes(tokenizer, texts):
    (ids,) = tokenizer.encode(texts[:1])
    assert len(ids) < len(texts[0]) / 2
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == 400


def test_newlines_are_ordinary_pieces(tokenizer):
    (ids,) = tokenizer.encode(["\n"])
    assert len(ids) == 1
    assert tokenizer._processor.id_to_piece(int(ids[0])) == "\n"  # not the byte <0x0A>


def test_digits_are_single(tokenizer):
    assert len(tokenizer.encode(["2024"])[0]) == 4


def test_threads_and_company_do_not_change_ids(tokenizer, texts):
    alone = [tokenizer.encode([text])[0].tolist() for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode(texts, threads=4)] == alone
    assert tokenizer.encode([]) == []


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    (ids,) = tokenizer.encode(["plain"])
    assert tokenizer.decode([1, *ids, 2, 3]) == "plain"


def test_training_is_repeatable(tokenizer, texts, small_config):
    assert train(texts, small_config).hash == tokenizer.hash
    assert train(texts[:-1], small_config).hash != tokenizer.hash


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode(["\ud800"])


def test_loaded_equals_saved(tokenizer, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(tokenizer.model)
    loaded = Tokenizer.load(path)
    assert loaded.hash == tokenizer.hash and loaded.encode(["a b"])[0].tolist() == tokenizer.encode(["a b"])[0].tolist()


def test_too_large_a_vocabulary_says_what_fits(texts):
    with pytest.raises(ValueError, match="vocab_size=30000 is more than .* set tokenizer.vocab_size=") as error:
        train(texts, TokenizerConfig(vocab_size=30_000))
    fits = int(str(error.value).split("tokenizer.vocab_size=")[2].split()[0])
    assert train(texts, TokenizerConfig(vocab_size=fits)).vocab_size == fits


def test_too_small_a_vocabulary_says_what_is_needed():
    many = "".join(chr(0x4E00 + i) for i in range(1000))
    with pytest.raises(ValueError, match="less than the 12.. bytes.*character_coverage"):
        train([many], TokenizerConfig(vocab_size=400))


def test_lossy_foreign_tokenizers_are_announced(tmp_path, texts, tokenizer, caplog):
    (tmp_path / "exact.model").write_bytes(tokenizer.model)
    Tokenizer.load(tmp_path / "exact.model")
    assert not caplog.records
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "lossy"), model_type="bpe", vocab_size=400,
        byte_fallback=True, minloglevel=2)
    Tokenizer.load(tmp_path / "lossy.model")
    assert "decoding is not exact" in caplog.text


def test_foreign_files_are_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="tokenizer.path=.*none.model cannot be read: .*none.model: No such file"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "text.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "bare"), model_type="bpe", vocab_size=300,
        byte_fallback=True, bos_id=-1, minloglevel=2)
    with pytest.raises(ValueError, match="has bos -1"):
        Tokenizer.load(tmp_path / "bare.model")


def test_cut_keeps_every_character():
    text = "ab\ncd\n" + "x" * 25 + "\n\n"
    for limit in (1, 3, 4, 10, 1000):
        pieces = list(cut(text, limit))
        assert "".join(pieces) == text and max(map(len, pieces)) <= limit
    assert list(cut("ab\ncd\nef", 7)) == ["ab\ncd\n", "ef"]
    assert list(cut("", 5)) == [""]
