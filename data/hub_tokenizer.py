"""Any fast tokenizer of Hugging Face's, by its name on the Hub or from a folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from sieve.data.tokenizer import SPACE, warn_if_lossy

logger = logging.getLogger(__name__)


class HubTokenizer:
    """The Encoder of a tokenizer.json. A document is encoded whole, and names of special tokens in it as plain text.

    A tokenizer without a token for the beginning of a document gets its end token for both, as GPT-2 has it.
    """

    kind = "huggingface"
    FILE = "tokenizer.json"

    def __init__(self, model: bytes, bos_id: int, eos_id: int, pad_id: int = -1):
        """model: a serialized `tokenizers.Tokenizer`, JSON."""
        self.model = model
        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        self._tokenizer.encode_special_tokens = True  # or a text could end its document
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        rules = {key: value for key, value in json.loads(model).items() if key not in ("truncation", "padding")}
        said = json.dumps([rules, bos_id, eos_id], sort_keys=True)
        self.hash = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, path: str | None) -> HubTokenizer:
        """The tokenizer of this name or folder, with a warning if it loses text. ValueError if it is not there, has no
        tokenizer.json or no end token."""
        if path is None:
            raise ValueError("tokenizer=huggingface needs tokenizer.path=NAME_ON_THE_HUB, or a folder")
        import transformers  # seconds

        folder = Path(path).expanduser()
        try:
            found = transformers.AutoTokenizer.from_pretrained(str(folder) if folder.exists() else path)
        except (OSError, ValueError, KeyError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"tokenizer.path={path} is no tokenizer that transformers can load: {line}") from error
        if not found.is_fast:
            raise ValueError(f"tokenizer.path={path} is a {type(found).__name__} without tokenizer.json; convert it")
        eos, bos = found.eos_token_id, found.bos_token_id
        if eos is None:
            raise ValueError(f"tokenizer.path={path} has no eos_token; documents need one to end with")
        if bos is None:
            logger.info("tokenizer.path=%s has no bos_token; documents begin with its %s", path, found.eos_token)
        tokenizer = cls(
            found.backend_tokenizer.to_str().encode(), eos if bos is None else bos, eos,
            -1 if found.pad_token_id is None else found.pad_token_id,
        )
        warn_if_lossy(tokenizer, path)
        return tokenizer

    def encode(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """As in Encoder; threads: the library's own, set by TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """As in Encoder."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def is_hub_model(model: bytes) -> bool:
    """Whether `model`, of an Encoder, is a HubTokenizer's."""
    return model[:1] == b"{"


def hub_token_bytes(model: bytes) -> list[int]:
    """[vocab]: how many UTF-8 bytes of text each token of a HubTokenizer's model stands for; 0 for special ones.

    Pieces of a byte-level vocabulary have a character for each byte; others are text, with SentencePiece's space mark
    and its <0x41> for single bytes.
    """
    tokenizer = tokenizers.Tokenizer.from_str(model.decode())
    rules = json.loads(model)
    byte_level = '"ByteLevel"' in json.dumps([rules.get("pre_tokenizer"), rules.get("decoder")])
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    sizes = [0] * (max(tokenizer.get_vocab().values()) + 1)
    for piece, i in vocabulary.items():
        if byte_level:
            sizes[i] = len(piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            sizes[i] = 1
        else:
            sizes[i] = len(piece.replace(SPACE, " ").encode())
    for i, token in tokenizer.get_added_tokens_decoder().items():
        sizes[i] = 0 if token.special else len(token.content.encode())
    return sizes
