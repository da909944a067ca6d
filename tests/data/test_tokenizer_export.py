"""transformers, with the exported files, gives SentencePiece's own ids on real text; and tokenizers come back whole."""

import functools

import pytest
from transformers import AutoTokenizer

from sieve.data.config import TokenizerConfig
from sieve.data.python_corpus import PythonSource
from sieve.data.tokenizer import Tokenizer, train
from sieve.data.tokenizer_export import _is_unigram, described, given_tokenizer, save, saved

AWKWARD = ["", " ", "  both  ", "a  b   c", "\n\n\t x\r\n", "naïve e\u0301", "漢字かな😀 unseen", "1234567890", "x = 0x1F  # ½",
           "\u00a0\u2003", "\0\x01", "def f(x):\n\treturn x\n"]


@functools.cache
def real_text():
    """Python sources of the standard library: (to train on, to compare on), in pieces of at most 2,000 characters."""
    texts = [d.text for d in PythonSource(min_bytes=256, max_bytes=900_000)]
    pieces = [text[i : i + 2000] for text in texts for i in range(0, len(text), 2000)]
    return pieces[::2], pieces[1::2]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    special = ("<|user|>", "<|end|>")
    return train(real_text()[0], TokenizerConfig(type=request.param, vocab_size=3000, special_tokens=special))


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save(trained, folder)
    return folder


def test_ids_equal_sentencepieces_on_real_text(trained, folder):
    """Unigram's cuts of equal probability, as of a run of spaces, are a matter of rounding: there the probability must
    be equal and the ids may differ, seldom."""
    exported, processor = AutoTokenizer.from_pretrained(folder), trained._processor
    special = [processor.id_to_piece(i) for i in range(6)]  # plain text to us, tokens to transformers
    pieces = [piece for piece in (*real_text()[1], *AWKWARD) if not any(name in piece for name in special)]
    assert len(pieces) > 200
    different = 0
    for piece, ids in zip(pieces, exported(pieces, add_special_tokens=False).input_ids):
        assert exported.decode(ids) == piece
        ours = processor.encode(piece)
        if ids != ours:
            different += 1
            scores = [sum(map(processor.get_score, each)) for each in (ids, ours)]
            assert _is_unigram(trained.model) and scores[0] == pytest.approx(scores[1], rel=1e-6), piece
    assert different <= 0.05 * len(pieces)


def test_special_tokens_keep_their_ids(trained, folder):
    exported = AutoTokenizer.from_pretrained(folder)
    assert (exported.unk_token_id, exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (0, 1, 2, 3)
    assert exported.convert_tokens_to_ids(["<|user|>", "<|end|>"]) == [4, 5] and len(exported) == trained.vocab_size
    assert exported("x").input_ids[0] == 1 and exported("<|user|>", add_special_tokens=False).input_ids == [4]
    (plain,) = trained.encode(["<|user|><s>"])
    assert not set(plain.tolist()) & set(range(6)) and trained.decode(plain) == "<|user|><s>"
    assert trained.decode([1, 4, *plain, 5, 2]) == "<|user|><s>"


def test_saved_comes_back(trained, folder):
    again = saved(folder, described(trained))
    assert isinstance(again, Tokenizer) and again.hash == trained.hash
    assert given_tokenizer(TokenizerConfig(path=str(folder))).hash == trained.hash
    with pytest.raises(ValueError, match="it was changed"):
        saved(folder, {**described(trained), "hash": "0"})
    with pytest.raises(ValueError, match="nothing/tokenizer.model cannot be read"):
        saved(folder / "nothing", described(trained))


def test_nothing_given_is_to_be_trained():
    assert given_tokenizer(TokenizerConfig()) is None


def test_unigram_on_little_text_has_fewer_pieces():
    small = train(["one two three four five six seven eight nine ten " * 20], TokenizerConfig(type="unigram", vocab_size=4000))
    assert 260 < small.vocab_size < 4000
    (ids,) = small.encode(["two seven \u6f22"])
    assert small.decode(ids) == "two seven \u6f22" and 0 not in ids
