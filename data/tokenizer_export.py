"""Tokenizers as folders that transformers' AutoTokenizer loads, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from sieve.data.config import TokenizerConfig
from sieve.data.hub_tokenizer import HubTokenizer
from sieve.data.tokenizer import SPACE, Encoder, Tokenizer

NEVER = -1e6  # a log probability below that of any spelling


def given_tokenizer(config: TokenizerConfig) -> Encoder | None:
    """The tokenizer that `config` names by its path, or None if one is to be trained. ValueError if it is not there."""
    if config.type == "huggingface":
        return HubTokenizer.load(config.path)
    return None if config.path is None else Tokenizer.load(config.path)


def save(tokenizer: Encoder, folder: Path) -> None:
    """Write `tokenizer` into the existing `folder`: the model itself, and the files of transformers.

    The exported one begins a text with bos unless it is told add_special_tokens=False. It gives the ids of
    SentencePiece, but takes the name of a special token in a text for that token and the space mark for a space, and
    where a unigram model has several cuts of equal probability, as of many spaces, rounding may choose another.
    """
    # seconds, which few callers spend
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, Tokenizer):
        (folder / Tokenizer.FILE).write_bytes(tokenizer.model)
        fast, names = _converted(tokenizer.model)
    else:
        fast, names = tokenizers.Tokenizer.from_str(tokenizer.model.decode()), {}
    names = {
        f"{role}_token": fast.id_to_token(i)
        for role, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)) if i >= 0
    } | names
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)


def saved(folder: Path, about: dict[str, Any]) -> Encoder:
    """The tokenizer that `save` wrote; about: what `described` said of it. ValueError if it is absent or another."""
    file = folder / (Tokenizer.FILE if about["kind"] == Tokenizer.kind else HubTokenizer.FILE)
    try:
        model = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    tokenizer = encoder_of(model, about, str(file))
    if tokenizer.hash != about["hash"]:
        raise ValueError(f"{file} is the tokenizer {tokenizer.hash} instead of {about['hash']}; it was changed")
    return tokenizer


def encoder_of(model: bytes, about: dict[str, Any], name: str = "the tokenizer") -> Encoder:
    """The tokenizer of a serialized model and of what `described` said of it."""
    if about["kind"] == Tokenizer.kind:
        return Tokenizer(model, name)
    return HubTokenizer(model, about["bos_id"], about["eos_id"], about["pad_id"])


def described(tokenizer: Encoder) -> dict[str, Any]:
    """JSON-able: what tells this tokenizer from others."""
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return {"kind": tokenizer.kind, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, **ids}


def _converted(model: bytes) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A `tokenizers.Tokenizer` with the ids of a SentencePiece model, and transformers' names of its special tokens.

    SentencePiece's BPE joins the pair whose piece has the best score, from the left; a rank for every way to split
    each piece, in the order of scores, says the same to `tokenizers`.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    control = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    unknown = processor.unk_id()
    scores = [processor.get_score(i) for i in range(len(pieces))]
    apart = {*control, *(i for i in range(len(pieces)) if processor.is_byte(i))}  # no text is ever cut to their names
    if _is_unigram(model):
        priced = [(piece, NEVER if i in apart else score) for i, (piece, score) in enumerate(zip(pieces, scores))]
        fast = tokenizers.Tokenizer(models.Unigram(priced, unk_id=unknown, byte_fallback=True))
    else:
        ids = {piece: i for i, piece in enumerate(pieces) if i not in apart}
        merges = []
        for piece, _ in sorted(ids.items(), key=lambda item: -scores[item[1]]):
            splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += sorted(((a, b) for a, b in splits if a in ids and b in ids), key=lambda s: (ids[s[0]], ids[s[1]]))
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        fast = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True)
        )
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in control])
    bos = pieces[processor.bos_id()]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, processor.bos_id())]
    )
    named = {unknown, processor.bos_id(), processor.eos_id(), processor.pad_id()}
    others = [pieces[i] for i in control if i not in named]
    return fast, {"unk_token": pieces[unknown]} | ({"additional_special_tokens": others} if others else {})


def _is_unigram(model: bytes) -> bool:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
