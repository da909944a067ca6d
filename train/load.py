"""What `sieve generate` and `sieve eval` call CHECKPOINT: a run, one of its checkpoints, or an exported folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sieve.data.mixture import Corpus, build_corpus
from sieve.eval.load import Loaded, Text, load_folder
from sieve.train import checkpoint
from sieve.train.build import build_model
from sieve.train.config import RunConfig
from sieve.train.phases import ropes
from sieve.train.weights import module_weights


@dataclass(frozen=True)
class Opened:
    """A model to use. config, corpus: of the run it is from, None for an exported folder. folder: what was opened, a run,
    a checkpoint or an exported model, where it lies now (config has where the run lay when it was trained)."""

    loaded: Loaded
    config: RunConfig | None
    corpus: Corpus | None
    folder: Path


def open_model(path: str, runs_dir: str, device: torch.device, dtype: torch.dtype) -> Opened:
    """`path`: a folder, or a run's name under runs_dir. ValueError, naming what would do, when it is no model."""
    found = next((p for p in (Path(path), Path(runs_dir) / path) if p.is_dir()), None)
    if found is None:
        raise ValueError(f"{path} is neither a folder nor a run under {runs_dir}")
    if (found / "config.json").is_file():
        return Opened(load_folder(found, device, dtype), None, None, found)
    saved = _saved(found)
    config = RunConfig.of(saved.manifest["config"])
    # Which kernels trained it does not matter here, and they may not be there.
    config = config.model_copy(update={"attention": config.attention.model_copy(update={"impl": "auto"})})
    if config.model.moe is not None:
        moe = config.model.moe.model_copy(update={"impl": "auto"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    corpus = build_corpus(config.data, config.tokenizer)
    with torch.device("meta"):
        decoder = build_model(config, torch.device("meta"), corpus.tokenizer.vocab_size)
    decoder = decoder.to_empty(device="cpu")
    decoder.load_state_dict(module_weights(saved))
    decoder.set_rope(ropes(config.model.rope, config.phases)[saved.phase])
    decoder = decoder.to(device, dtype).eval().requires_grad_(False)
    name = f"{config.name} step {saved.step}"
    loaded = Loaded(name, decoder, Text.of(corpus.tokenizer), config.phases[saved.phase].seq_len)
    return Opened(loaded, config, corpus, found)


def _saved(folder: Path) -> checkpoint.Saved:
    if (folder / checkpoint.MANIFEST).is_file():
        return checkpoint.Saved.read(folder)
    there = checkpoint.checkpoints(folder)
    if not there:
        raise ValueError(
            f"{folder} is no model: neither a run with checkpoints, nor a checkpoint (manifest.json), nor an exported "
            "folder (config.json)"
        )
    return checkpoint.Saved.read(there[max(there)])
