"""Which text to train on and how to cut it into tokens: frozen, validated settings, with every default of data."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Installed packages hold hundreds of megabytes, most of them not worth the wait of a first start.
DEFAULTS_OF_TYPE = {
    "python": {"min_bytes": 256, "max_bytes": 24_000_000, "validation_fraction": 0.02},
    "files": {"name": "files"},
    "hub": {"name": "hub"},
    "shards": {"name": "shards"},
}
KEYS_OF_TYPE = {  # keys that say where the text is, and the types that read them
    "paths": ("files", "shards"), "validation_paths": ("files",), "repo": ("hub",), "subset": ("hub",),
    "data_dir": ("hub",), "revision": ("hub",), "validation_split": ("hub",),
}

BUILT_IN = re.compile("<unk>|<s>|</s>|<pad>|<0x[0-9A-F]{2}>")  # pieces of every tokenizer that is trained


class Config(BaseModel):
    """Base of every settings model: immutable, and an unknown key is an error that names the closest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(cls.model_fields)}"
                    raise ValueError(f"{cls.__name__} has no key {key!r}; {hint}")
        return values


# What a mixture has once; all other keys of DataConfig are a source's.
OF_THE_WHOLE = {"name", "threads", "cache_dir", "packing", "sources", "phases", "workers", "prefetch"}

Packing = Literal["concatenate", "best_fit", "document"]
_Factors = dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]]
_Weights = dict[str, Annotated[float, Field(ge=0)]]


class PhaseConfig(Config):
    """What changes at a token count; what is null stays as it was before.

    It begins with the first step that finds from_tokens tokens read (by all processes, padding included). Batches are
    in rows of seq_len tokens.
    """

    from_tokens: int = Field(gt=0)
    seq_len: int | None = Field(None, gt=0)
    global_batch: int | None = Field(None, gt=0)
    micro_batch: int | None = Field(None, gt=0)
    packing: Packing | None = None
    weights: _Weights | None = Field(None, description="of every source of the mixture")
    upsample: _Factors | None = Field(None, description="of every source, instead of its own")
    rope_factor: float | None = Field(None, ge=1, description="YaRN's stretch of the run's first seq_len; 1: none")


class DataConfig(Config):
    """A source of documents and its split into training and validation text; or, with `sources`, a mixture of such.

    `type="python"` needs nothing: it reads the Python sources of the running interpreter and its packages.
    `type="files"` reads `paths`: files, folders, globs or URLs of text, JSON lines (plain, .gz, .zst) and parquet.
    `type="hub"` reads the data set `repo` of the Hugging Face Hub, or a local folder in its layout, file by file.
    `type="shards"` reads the tokens in the folder `paths` that `sieve prepare` wrote.
    Byte counts are of UTF-8 text, uncompressed. Without `validation_paths` or `validation_split`, every k-th document
    is for validation, k = 1 / validation_fraction; of a source that is one document, its last part.
    """

    name: str = "python"
    type: Literal["python", "files", "hub", "shards"] = "python"
    paths: tuple[str, ...] = Field((), description="files: files, folders globs, URLs; shards: one folder")
    repo: str | None = Field(None, description="hub: OWNER/NAME, or a local folder")
    subset: str | None = Field(None, description="hub: one of the data set's configurations")
    data_dir: str | None = Field(None, description="hub: a folder of the data set")
    revision: str | None = Field(None, description="hub: a branch, tag or commit; null: main")
    split: str = Field("train", min_length=1, description="hub")
    validation_split: str | None = Field(None, description="hub; null: a part of split")
    validation_paths: tuple[str, ...] = Field((), description="as paths; empty: a part of paths")
    validation_fraction: float = Field(0.01, gt=0, le=0.5, description="0.02 if python")
    format: Literal["auto", "text", "jsonl", "parquet"] = Field("auto", description="auto: by each file's name")
    text_field: str = Field("text", min_length=1, description="of a JSON line or a parquet row")
    min_bytes: int = Field(1, ge=1, description="shorter documents are left out; 256 if python")
    max_bytes: int | None = Field(None, gt=0, description="stop after this much text; null: no limit; 24 MB if python")
    max_document_bytes: int = Field(64 << 20, gt=0, description="larger documents count as broken")
    max_broken: int = Field(100, ge=0, description="undecodable documents to skip before giving up")
    threads: int | None = Field(None, gt=0, description="for tokenisation; null: the cores this process may use")
    storage_options: dict[str, Any] = Field({}, description="fsspec's, for URLs, as {anon:true} for a public s3 bucket")
    retries: int = Field(8, ge=0, description="of one request over the network, with growing pauses")
    timeout: float = Field(60, gt=0, description="seconds without a byte until a connection counts as lost")
    verify: Literal["once", "always", "never"] = Field("once", description="shards: once on this machine, or at each start")
    cache_dir: str | None = Field(None, description="null: $XDG_CACHE_HOME/sieve or ~/.cache/sieve")
    upsample: _Factors = Field({}, description="{length: factor}: documents of so many tokens on, factor times as often")
    packing: Packing = Field("concatenate", description="best_fit: no short document is cut; document: one a row")
    sources: dict[str, SourceConfig] = Field({}, description="a mixture: {name: {weight: ..., type: ..., ...}}")
    phases: tuple[PhaseConfig, ...] = Field((), description="later changes: [{from_tokens: ..., seq_len: ...}]")
    workers: int | None = Field(None, ge=0, description="threads that read ahead; null: 1 on CUDA, else 0")
    prefetch: int = Field(2, ge=1, description="steps that a worker reads ahead")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_type(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**DEFAULTS_OF_TYPE.get(values.get("type", "python"), {}), **values}
        return values

    @model_validator(mode="before")
    @classmethod
    def _sources_say_their_type(cls, values: Any) -> Any:
        # A misspelt name is a new source, which by its defaults alone would be this machine's Python files.
        sources = values.get("sources") if isinstance(values, dict) else None
        if isinstance(sources, dict):
            typeless = [name for name, source in sources.items() if isinstance(source, dict) and "type" not in source]
            others = [str(name) for name in sources if name not in typeless]
            for name in typeless:
                near = difflib.get_close_matches(str(name), others, n=1)
                hint = f"did you mean data.sources.{near[0]}?" if near else f"there are {', '.join(others) or 'no others'};"
                raise ValueError(
                    f"data.sources.{name} has no type; {hint} a new source needs data.sources.{name}.type="
                    f"{'|'.join(DEFAULTS_OF_TYPE)}"
                )
        return values

    @field_validator("paths", "validation_paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @model_validator(mode="after")
    def _mixture_is_whole(self) -> DataConfig:
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"sources has the name {name!r}; names take letters, digits, '-' and '_'")
        usual = DEFAULTS_OF_TYPE["python"]
        for key, field in DataConfig.model_fields.items() if self.sources else ():
            if key not in OF_THE_WHOLE and getattr(self, key) != usual.get(key, field.default):
                value = getattr(self, key)
                shown = f"[{','.join(value)}]" if isinstance(value, tuple) else value
                raise ValueError(f"{key}={shown} beside sources; it belongs to a source: data.sources.NAME.{key}")
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ValueError("sources: every weight is 0; give one that is not")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_the_type(self) -> DataConfig:
        for key, types in KEYS_OF_TYPE.items():
            if getattr(self, key) and self.type not in types:
                reads = "reads no files" if "files" in types else "does not read it"
                if isinstance(self, SourceConfig):
                    raise ValueError(f"type={self.type} {reads}, but {key} is given; choose type={types[0]}")
                raise ValueError(f"data.{key} is given, but data.type={self.type} {reads}; choose data={types[0]}")
        return self

    @model_validator(mode="after")
    def _phases_follow(self) -> DataConfig:
        starts = [phase.from_tokens for phase in self.phases]
        for i, (before, start) in enumerate(zip(starts, starts[1:]), 1):
            if start <= before:
                raise ValueError(
                    f"phases[{i}].from_tokens={start} does not come after phases[{i - 1}].from_tokens={before}; list "
                    "phases in their order"
                )
        for i, phase in enumerate(self.phases):
            if phase.weights is None:
                continue
            if set(phase.weights) != set(self.sources):
                raise ValueError(
                    f"phases[{i}].weights={phase.weights}: must name each of sources, which are "
                    f"{', '.join(self.sources) or 'not given'}; 0 leaves one out"
                )
            if not any(phase.weights.values()):
                raise ValueError(f"phases[{i}].weights={phase.weights}: every weight is 0; give one that is not")
        return self


class SourceConfig(DataConfig):
    """One source of a mixture. Its share of the tokens is its weight over the sum of weights, in every phase that
    gives no weights of its own."""

    weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _no_mixture(self) -> SourceConfig:
        for key in sorted(OF_THE_WHOLE - {"name", "threads", "cache_dir"}):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)}: is set for the whole mixture, at data.{key}")
        return self


class TokenizerConfig(Config):
    """SentencePiece with byte fallback, trained at first use or loaded from `path`; or a tokenizer of Hugging Face's.

    `sample_bytes`: how much training text it learns from. `character_coverage`: the share of the sample's characters
    that get a piece of their own; the rest is spelt in bytes, so that no text is ever unknown. `special_tokens` get
    ids of their own, behind <unk>, <s>, </s> and <pad>, that no text is ever encoded to.
    """

    name: str = "bpe4k"
    type: Literal["bpe", "unigram", "huggingface"] = "bpe"
    path: str | None = Field(None, description="a .model file or a folder of `sieve tokenizer`, null: train one; "
                                               "huggingface: a name on the Hub or a folder")
    vocab_size: int = Field(4096, gt=260, description="of a trained one; 260 are bytes and special tokens")
    sample_bytes: int = Field(8_000_000, gt=0)
    character_coverage: float = Field(0.9995, gt=0, le=1)
    split_digits: bool = True
    max_piece_length: int = Field(16, gt=0)
    special_tokens: tuple[str, ...] = Field((), description="reserved, as [<|user|>,<|end|>]; of a trained one")

    @field_validator("special_tokens")
    @classmethod
    def _tokens_of_their_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for i, name in enumerate(value):
            if not re.search(r"[^\s\u2581]", name):  # the last is how SentencePiece writes a space
                raise ValueError(f"{name!r} has no visible character; leave it out, or give it a name")
            if name in value[:i]:
                raise ValueError(f"{name!r} is there twice; name each once")
            if BUILT_IN.fullmatch(name):
                raise ValueError(f"{name!r} is a piece of every trained tokenizer already; leave it out, or choose another")
        return value
