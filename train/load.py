"""What `sieve generate` and `sieve eval` call CHECKPOINT: a run, one of its checkpoints, or an exported folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sieve.data.mixture import build_corpus
from sieve.data.tokenizer import Encoder
from sieve.data.tokens import Tokens
from sieve.eval.load import Loaded, Text, load_folder
from sieve.train import checkpoint
from sieve.train.build import build_model
from sieve.train.config import RunConfig
from sieve.train.weights import SOURCE, SavedWeights, module_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model to use. config, tokenizer: of the run it is from, None for an exported folder, which has its text in `loaded`.
    folder: what was opened, a run, a checkpoint or an exported model, where it lies now (config has where the run lay when it
    was trained). validation_ids: of the run's validation text by source, none where its checkpoint does not say."""

    loaded: Loaded
    config: RunConfig | None
    tokenizer: Encoder | None
    folder: Path
    validation_ids: dict[str, str] = field(default_factory=dict)

    def validation(self) -> dict[str, Tokens]:
        """The run's validation text by source, none for an exported folder. ValueError when it cannot be had any more, or has
        become another one since."""
        if self.config is None:
            return {}
        corpus = build_corpus(self.config.data, self.config.tokenizer)
        if corpus.tokenizer.hash != self.tokenizer.hash:
            raise ValueError(
                f"the text of {self.config.name} has changed since: its tokenizer is {corpus.tokenizer.hash} now and was "
                f"{self.tokenizer.hash}; name the text to measure by loss.source"
            )
        for name, tokens in corpus.validation.items():
            if tokens.id != self.validation_ids.get(name, tokens.id):
                of = f" ({name})" if len(corpus.validation) > 1 else ""
                raise ValueError(
                    f"the validation text of {self.config.name}{of} has changed since; name the text to measure by loss.source"
                )
        return corpus.validation


def open_model(path: str, runs_dir: str, device: torch.device, dtype: torch.dtype) -> Opened:
    """`path`: a folder, or a run's name under runs_dir. ValueError, naming what would do, when it is no model."""
    found = next((p for p in (Path(path), Path(runs_dir) / path) if p.is_dir()), None)
    if found is None:
        raise ValueError(f"{path} is neither a folder nor a run under {runs_dir}")
    if (found / "config.json").is_file():
        return Opened(load_folder(found, device, dtype), None, None, found)
    if not (found / checkpoint.COMPLETE).is_file() and not checkpoint.checkpoints(found):
        raise ValueError(
            f"{found} is no model: neither a run with checkpoints, nor a checkpoint (manifest.json), nor an exported "
            "folder (config.json)"
        )
    saved = checkpoint.newest(found)
    config = RunConfig.of(saved.manifest["config"])
    # Which kernels trained it does not matter here, and they may not be there.
    config = config.model_copy(update={"attention": config.attention.model_copy(update={"impl": "auto"})})
    if config.model.moe is not None:
        moe = config.model.moe.model_copy(update={"impl": "auto"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    tokenizer = tokenizer_of(saved, config)
    with torch.device("meta"):
        decoder = build_model(config, torch.device("meta"), tokenizer.vocab_size)
    decoder = decoder.to_empty(device="cpu")
    weights = SavedWeights(saved)
    decoder.load_state_dict(module_weights(saved))
    decoder.set_rope(weights.rope)
    decoder = decoder.to(device, dtype).eval().requires_grad_(False)
    name = f"{config.name} step {saved.step}"
    loaded = Loaded(name, decoder, Text.of(tokenizer), weights.seq_len)
    return Opened(loaded, config, tokenizer, found, saved.manifest.get("validation", {}))


def tokenizer_of(saved: checkpoint.Saved, config: RunConfig) -> Encoder:
    """The checkpoint's tokenizer; of one of an earlier version, which has none, that of the text its run names. ValueError when
    that cannot be had, or is another one by its size."""
    tokenizer = saved.tokenizer()
    if tokenizer is None:
        log.warning("%s has no tokenizer; taking that of the text which its run names, if it is still the same", saved.path)
        tokenizer = build_corpus(config.data, config.tokenizer).tokenizer
    rows = saved.manifest["parameters"][SOURCE][0]
    if tokenizer.vocab_size != rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces and {saved.path} embeds {rows}; it is another one's")
    return tokenizer
