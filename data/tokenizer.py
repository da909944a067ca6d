"""SentencePiece with byte fallback: every string comes back exactly, and no token is ever unknown."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from sieve.data.config import TokenizerConfig

logger = logging.getLogger(__name__)

SPACE = "\u2581"  # SentencePiece writes a space so; the character itself would come back as a space
PIECE_CHARS = 16_384  # texts are encoded in pieces of at most so many characters: bounds memory, evens out threads
SAMPLE_CHARS = 2_048
_PROBE = " a\n\tb  1\u00bd \u6f22\U0001f600 "  # what a lossy tokenizer trims, normalizes or does not know
TRAINING_THREADS = 2  # fixed, for the model file records it and its hash must not depend on the machine


class Encoder(Protocol):
    """Strings to ids and back.

    kind: how `model`, a serialized tokenizer, is read. FILE: what a file of it is called. bos_id, eos_id; pad_id is -1 if there
    is none. hash: hex, equal for tokenizers that give equal ids.
    """

    kind: str
    FILE: str
    model: bytes
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    hash: str

    def encode(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Each text's ids, int32 [length], without bos and eos."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bos, eos and pad add nothing."""


def as_documents(encoder: Encoder, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
    """[bos] + ids + [eos] of each text, int32."""
    bos, eos = np.array([encoder.bos_id], np.int32), np.array([encoder.eos_id], np.int32)
    return [np.concatenate((bos, ids, eos)) for ids in encoder.encode(texts, threads)]


class Tokenizer:
    """The Encoder of a SentencePiece model; hash is of the model file's bytes."""

    kind = "sentencepiece"
    FILE = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """model: a serialized SentencePiece model. Raises ValueError if it is none, or has no bos or eos."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{name} has bos {self.bos_id} and eos {self.eos_id}; documents need both (-1: absent)")
        self.hash = hashlib.blake2b(model, digest_size=16).hexdigest()
        spelt = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space = spelt if self._processor.unk_id() not in spelt else None

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """The tokenizer in a .model file, or in a folder that has one of the name FILE, with a warning if it loses
        text. ValueError if it is none or unreadable."""
        file = Path(path).expanduser()
        try:
            model = (file / cls.FILE if file.is_dir() else file).read_bytes()
        except OSError as error:
            hint = "; for its tokenizer.json choose tokenizer=huggingface" if (file / "tokenizer.json").exists() else ""
            raise ValueError(f"tokenizer.path={path} cannot be read: {error.filename}: {error.strerror}{hint}") from error
        tokenizer = cls(model, f"tokenizer.path={path}")
        warn_if_lossy(tokenizer, path)
        return tokenizer

    def encode(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Each text's ids, int32 [length], without bos and eos; decode gives the very text back.

        Raises UnicodeEncodeError, a ValueError, for text that UTF-8 cannot hold (lone surrogates).
        """
        pieces: list[bytes] = []
        plans = [self._plan(text, pieces) for text in texts]
        encoded = self._processor.encode(pieces, num_threads=threads)
        return [np.concatenate([np.asarray(self._space if i < 0 else encoded[i], np.int32) for i in p]) for p in plans]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bos, eos and pad add nothing."""
        return self._processor.decode([int(i) for i in ids])

    def _plan(self, text: str, pieces: list[bytes]) -> list[int]:
        """Appends what of `text` is to be encoded to `pieces`; returns their indices in order, -1 for a space mark."""
        plan: list[int] = []
        for piece in cut(text, PIECE_CHARS):
            for i, part in enumerate(piece.split(SPACE) if self._space else (piece,)):
                plan += [-1, len(pieces)] if i else [len(pieces)]
                pieces.append(part.encode())
        return plan


def warn_if_lossy(tokenizer: Encoder, path: Path | str) -> None:
    """A warning in the log if `tokenizer` does not give back every text."""
    (ids,) = tokenizer.encode([_PROBE])
    if tokenizer.decode(ids) != _PROBE:
        logger.warning("tokenizer.path=%s normalizes text or has unknown characters: decoding is not exact", path)


def cut(text: str, limit: int) -> Iterator[str]:
    """`text` in consecutive pieces of at most `limit` characters, after a newline where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A new tokenizer of `config.vocab_size` pieces, learnt from `texts`: the same for the same texts, in any run.

    Raises ValueError when the text is too little for so many pieces or has more kinds of characters than fit.
    """
    # A space mark would be learnt as a space; a piece of many lines lets newlines be learnt like other characters.
    sentences = (piece for text in texts for piece in cut(text.replace(SPACE, ""), SAMPLE_CHARS) if piece)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, model_type=config.type, vocab_size=config.vocab_size,
            character_coverage=config.character_coverage, byte_fallback=True, split_digits=config.split_digits,
            max_sentencepiece_length=config.max_piece_length, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_threads=TRAINING_THREADS,
            max_sentence_length=SAMPLE_CHARS * 4 + 1, minloglevel=2,
            **({"control_symbols": list(config.special_tokens)} if config.special_tokens else {}),
            # The unigram trainer ends with fewer pieces where the text has no more that are worth one.
            **({"hard_vocab_limit": False} if config.type == "unigram" else {}),
        )
    except RuntimeError as error:
        raise ValueError(_why(str(error), config)) from error
    return Tokenizer(model.getvalue())


def _why(message: str, config: TokenizerConfig) -> str:
    asked = f"tokenizer.vocab_size={config.vocab_size}"
    if found := re.search(r"Vocabulary size too high .*value <= (\d+)", message):
        return (
            f"{asked} is more than the training text can give: it has pairs for {found[1]} pieces; "
            f"set tokenizer.vocab_size={found[1]} or less, or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{asked} is less than the {found[1]} bytes, special tokens and characters of the training text; "
            f"set tokenizer.vocab_size above {found[1]}, or tokenizer.character_coverage below "
            f"{config.character_coverage}"
        )
    return f"the tokenizer could not be trained with {config}: {message}"
