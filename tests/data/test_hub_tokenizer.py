"""Somebody's tokenizer from a folder in the format of transformers: byte-level, without bos, and wrong ones."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sieve.data.config import TokenizerConfig
from sieve.data.hub_tokenizer import HubTokenizer, hub_token_bytes, is_hub_model
from sieve.data.prepare import build_stores
from sieve.data.tokenizer_export import described, given_tokenizer, save, saved
from sieve.eval.perplexity import token_bytes

AWKWARD = ["", " ", "a  b", "\n\t", "naïve 漢字 😀", "<|endoftext|> is text here", "1234", "\u2581"]


def byte_level(folder, texts, **names):
    """As GPT-2's: byte-level BPE, one special token for everything."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def gpt(tmp_path, texts):
    return byte_level(tmp_path / "gpt", texts, eos_token="<|endoftext|>", pad_token="<|pad|>")


def test_texts_come_back_and_cannot_end_their_document(gpt, texts):
    tokenizer = HubTokenizer.load(gpt)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 1) and tokenizer.vocab_size > 300
    for text, ids in zip([*AWKWARD, *texts], tokenizer.encode([*AWKWARD, *texts])):
        assert tokenizer.decode(ids) == text and 0 not in ids and ids.dtype == np.int32
    assert tokenizer.decode([0, *tokenizer.encode(["plain"])[0], 0]) == "plain"


def test_saved_comes_back(gpt, tmp_path):
    tokenizer = HubTokenizer.load(gpt)
    (tmp_path / "again").mkdir()
    save(tokenizer, tmp_path / "again")
    again = saved(tmp_path / "again", described(tokenizer))
    assert again.hash == tokenizer.hash and again.encode(["a b"])[0].tolist() == tokenizer.encode(["a b"])[0].tolist()
    assert HubTokenizer.load(str(tmp_path / "again")).hash == tokenizer.hash


def test_hash_tells_tokenizers(gpt, tmp_path, texts):
    other = byte_level(tmp_path / "other", texts[:1], eos_token="<|endoftext|>")
    assert HubTokenizer.load(other).hash != HubTokenizer.load(gpt).hash


def test_bytes_of_tokens_add_up(gpt, texts, tokenizer, tmp_path):
    hub = HubTokenizer.load(gpt)
    (tmp_path / "ours").mkdir()
    save(tokenizer, tmp_path / "ours")
    ours = HubTokenizer.load(str(tmp_path / "ours"))
    for each in (hub, ours):
        sizes = np.array(hub_token_bytes(each.model))
        for text in [*AWKWARD[:5], *texts]:
            assert sizes[each.encode([text])[0]].sum() == len(text.encode())
        assert sizes[each.bos_id] == sizes[each.eos_id] == 0
    assert token_bytes(ours.model).tolist() == token_bytes(tokenizer.model).tolist()
    assert is_hub_model(hub.model) and not is_hub_model(tokenizer.model)


def test_training_stores_with_it(gpt, texts, tmp_path):
    from sieve.data.config import DataConfig

    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    data = DataConfig(type="files", paths=str(tmp_path / "texts"), validation_fraction=0.25, cache_dir=str(tmp_path / "c"))
    tokenizer, train, validation = build_stores(data, TokenizerConfig(type="huggingface", path=gpt))
    assert [tokenizer.decode(validation.document(i)) for i in range(3)] == texts[::4]


def test_mistakes(tmp_path, texts):
    with pytest.raises(ValueError, match="tokenizer=huggingface needs tokenizer.path"):
        given_tokenizer(TokenizerConfig(type="huggingface"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tokenizer.path=.*empty is no tokenizer that transformers can load"):
        HubTokenizer.load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="has no eos_token"):
        HubTokenizer.load(byte_level(tmp_path / "endless", texts))
    with pytest.raises(ValueError, match="for its tokenizer.json choose tokenizer=huggingface"):
        given_tokenizer(TokenizerConfig(path=byte_level(tmp_path / "gpt2", texts, eos_token="<|endoftext|>")))
