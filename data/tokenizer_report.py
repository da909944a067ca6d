"""What a tokenizer makes of text that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sieve.data.document import Source, size_of
from sieve.data.split import Split
from sieve.data.tokenizer import PIECE_CHARS, Encoder, Tokenizer, cut

COMPARED_PIECES = 64  # of the held-out text, for the export's ids: a second at most


def held_out(passes: Sequence[tuple[Source, Split]], sample_bytes: int, max_bytes: int) -> Iterator[str]:
    """At most about `max_bytes` of validation text: of its own source, or of the documents in the tokenizer's sample
    that the split keeps from training."""
    source, split = passes[-1]
    texts = (text for document in source.sample(max(sample_bytes, max_bytes)) for part, text in split.parts(document)
             if part == "validation")
    for text in texts:
        yield text
        max_bytes -= size_of(text)
        if max_bytes <= 0:
            return


def measure(encoder: Encoder, texts: Iterable[str]) -> dict[str, Any]:
    """Documents, UTF-8 bytes, characters and tokens (without bos and eos) of `texts`, bytes and characters a token, and
    the share of the vocabulary that occurs."""
    documents = size = characters = tokens = 0
    seen: set[int] = set()
    for text in texts:
        (ids,) = encoder.encode([text])
        documents, size, characters, tokens = documents + 1, size + size_of(text), characters + len(text), tokens + len(ids)
        seen.update(ids.tolist())
    if not tokens:
        return {"documents": 0, "bytes": 0, "tokens": 0}
    return {
        "documents": documents, "bytes": size, "characters": characters, "tokens": tokens,
        "bytes_per_token": size / tokens, "characters_per_token": characters / tokens,
        "vocabulary_seen": len(seen) / encoder.vocab_size,
    }


def compare_export(encoder: Encoder, folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Of the first pieces of `texts`, how many get the same ids from transformers with the files in `folder`."""
    import transformers

    exported = transformers.AutoTokenizer.from_pretrained(str(folder))
    limit = PIECE_CHARS if isinstance(encoder, Tokenizer) else 10 * PIECE_CHARS
    pieces = list(islice((piece for text in texts for piece in cut(text, limit) if piece), COMPARED_PIECES))
    equal = sum(
        exported(piece, add_special_tokens=False).input_ids == ids.tolist()
        for piece, ids in zip(pieces, encoder.encode(pieces))
    )
    return {"pieces": len(pieces), "equal": equal}
