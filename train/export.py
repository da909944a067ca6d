"""`sieve export`: a checkpoint's weights in the layout of transformers, written without a GPU and tensor by tensor."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sieve.data import tokenizer_export
from sieve.data.disk import writing
from sieve.data.tokenizer import Encoder
from sieve.train import checkpoint
from sieve.train.checkpoint import Saved
from sieve.train.config import RunConfig
from sieve.train.load import tokenizer_of
from sieve.train.tensorfile import sync_folder, write_bytes, write_tensors
from sieve.train.text import byte_size
from sieve.train.weights import SOURCE, SavedWeights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def export(
    saved: Saved, out: Path, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9,
    tokenizer: Encoder | None = None,
) -> int:
    """Write config.json and model*.safetensors, with their index when there are several, and the tokenizer's files, if
    one is given, into the new folder `out`; the bytes of the weights. Holds one tensor at a time, hence less than a
    shard. ValueError when `out` is not empty, or the tokenizer is another model's."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder")
    weights = SavedWeights(saved, dtype)
    rows = weights.layout(SOURCE)[1][0]
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces and the model embeds {rows}; it is another one's")
    shards = plan(weights, shard_bytes)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(partial):
            total = _write(partial, weights, shards, tokenizer)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what a full disk has cut short is as large as the disk
    return total


def _write(folder: Path, weights: SavedWeights, shards: list[list[str]], tokenizer: Encoder | None) -> int:
    """All files, into `folder`; the bytes of the weights."""
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        layout = {tensor: weights.layout(tensor) for tensor in names}
        size, _ = write_tensors(folder / name, layout, weights.__getitem__, {"format": "pt"})
        index |= dict.fromkeys(names, name)
        total += sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
        print(f"{name}: {len(names)} tensors, {byte_size(size)} ({number} of {len(shards)})", file=sys.stderr, flush=True)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    write_json(folder / "config.json", config_of(weights, tokenizer))
    if tokenizer is not None:
        tokenizer_export.save(tokenizer, folder)
    sync_folder(folder)
    return total


def plan(weights: SavedWeights, shard_bytes: int) -> list[list[str]]:
    """The names of each file's tensors: in order, each file as full as it may be; a larger tensor has one of its own."""
    shards: list[list[str]] = []
    filled = math.inf
    for name in weights.names:
        kind, shape = weights.layout(name)
        size = kind.itemsize * math.prod(shape)
        if filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def config_of(weights: SavedWeights, tokenizer: Encoder | None = None) -> dict[str, Any]:
    """config.json: what sieve.model.config.ModelConfig and AttentionConfig take, and what transformers looks for."""
    run = weights.config
    roles = () if tokenizer is None else ("bos", "eos", "pad")
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in roles}
    return {
        "model_type": "sieve", "architectures": ["SieveForCausalLM"], "dtype": str(weights.dtype).removeprefix("torch."),
        "vocab_size": weights.layout(SOURCE)[1][0], "max_position_embeddings": weights.seq_len,
        "tie_word_embeddings": weights.tied,
        "model": _any_kernels(run["model"] | {"rope": weights.rope.model_dump(mode="json")}),
        "attention": run["attention"] | {"impl": "auto"},  # which kernels trained it is no property of the weights
    } | {name: number for name, number in ids.items() if number >= 0}


def _any_kernels(model: dict[str, Any]) -> dict[str, Any]:
    return model | {"moe": model["moe"] | {"impl": "auto"}} if model["moe"] else model


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def _bytes(text: str) -> int:
    """'5GB' -> 5000000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", text.strip().lower())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text} is no size; give one as 500MB or 5GB")
    return int(float(found[1]) * _UNITS[found[2]])


def _tokenizer(saved: Saved) -> Encoder:
    try:
        return tokenizer_of(saved, RunConfig.of(saved.manifest["config"]))
    except (ValueError, OSError) as error:
        raise ValueError(f"the run's tokenizer cannot be had: {error}; --no-tokenizer leaves it out") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 after a message for a user's mistake."""
    parser = argparse.ArgumentParser(prog="sieve export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's: its newest whole one")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; else the run's own")
    parser.add_argument("--shard-size", type=_bytes, default="5GB", metavar="SIZE", help="of a file (default %(default)s)")
    parser.add_argument("--no-tokenizer", action="store_true", help="the weights and config.json alone")
    options = parser.parse_args(argv)
    try:
        saved = checkpoint.newest(options.checkpoint)
        dtype = None if options.dtype is None else _DTYPES[options.dtype]
        tokenizer = None if options.no_tokenizer else _tokenizer(saved)
        total = export(saved, options.out, dtype, options.shard_size, tokenizer)
    except ValueError as error:
        print(f"sieve export: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {byte_size(total)} of weights, of step {saved.step}")
    return 0
