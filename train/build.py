"""From a config to a run that can start: the one place where the parts meet."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from sieve.data.loader import RowLoader
from sieve.data.mixture import Corpus, build_corpus
from sieve.data.packing import Batch
from sieve.data.phases import Phase
from sieve.data.validation import validation_batches
from sieve.eval.examples import predictor
from sieve.eval.load import Text
from sieve.eval.perplexity import PositionLoss
from sieve.eval.runner import alphabet_of, synthetic
from sieve.model.count import dense_flops_per_token, flops_per_token
from sieve.model.decoder import Decoder
from sieve.model.init import initial_value, initialize
from sieve.train import checkpoint
from sieve.train.callbacks.baseline import BaselineCallback, resolve_baseline
from sieve.train.callbacks.callback import Callback, Callbacks
from sieve.train.callbacks.check import Parity, SelfCheck
from sieve.train.callbacks.checkpoint import Checkpoint
from sieve.train.callbacks.console import Console
from sieve.train.callbacks.evaluate import Evaluate, Evaluation
from sieve.train.callbacks.health import Health
from sieve.train.callbacks.jsonl import Jsonl
from sieve.train.callbacks.profile import Profile
from sieve.train.callbacks.speed import Speed
from sieve.train.callbacks.wandb import Wandb
from sieve.train.callbacks.watchdog import Watchdog
from sieve.train.config import RunConfig
from sieve.train.distributed import Place, any_rank, barrier, sum_over_ranks
from sieve.train.engine import Engine
from sieve.train.environment import environment
from sieve.train.optim import adamw
from sieve.train.parity import check_parity
from sieve.train.phases import ropes
from sieve.train.saver import Saver
from sieve.train.selfcheck import AttentionCheck
from sieve.train.signals import StopSignal
from sieve.train.start import weights_of
from sieve.train.state import RunState
from sieve.train.zero import deepspeed_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """Everything the loop needs."""

    run: RunState
    engine: Engine
    loader: RowLoader
    callbacks: Callback


def build(config: RunConfig, place: Place, start: checkpoint.Saved | None, stop: StopSignal) -> Training:
    """Read the text, make the model, load `start` if there is one, and write what describes the run into its folder.

    ValueError where the config asks for something that this machine or the text cannot give.
    """
    baseline = None if config.baseline is None else resolve_baseline(config.baseline, config.runs_dir, config.directory)
    corpus = build_corpus(config.data, config.tokenizer)
    vocab_size, phases = corpus.tokenizer.vocab_size, config.phases
    module = build_model(config, place.device, vocab_size)
    zero = deepspeed_config(
        config.zero, dtype=config.dtype, clip=config.optim.clip, global_batch=phases[0].global_batch,
        micro_batch=phases[0].micro_batch, world_size=place.world_size, cuda=place.device.type == "cuda",
    )
    facts = environment(config, place, vocab_size)
    initial = partial(initial_value, config=config.model, seed=config.seed)
    if config.init is not None and start is None:
        initial = weights_of(Path(config.init), config, vocab_size)
        with torch.no_grad():
            for name, value in module.state_dict().items():  # the routers' biases among them
                value.copy_(initial(name, value.shape))
    engine = Engine(
        module, adamw(module, config.optim, place.device), zero, place, clip=config.optim.clip,
        initial=initial, ropes=ropes(config.model.rope, phases),
    )
    run = RunState(
        config, config.directory, place.rank, place.world_size, config.total_steps, facts["flops_per_token"],
        validation={name: tokens.id for name, tokens in corpus.validation.items()},
    )
    if start is not None:
        checkpoint.restore(start, run, engine)
    on_cuda = place.device.type == "cuda"
    open_loader = partial(
        RowLoader, corpus.train, phases, rank=place.rank, world_size=place.world_size, seed=config.seed,
        workers=int(on_cuda) if config.data.workers is None else config.data.workers, prefetch=config.data.prefetch,
        pin=place.device if on_cuda else None,
    )
    loader = resumed_loader(open_loader, run)
    if start is not None:  # after the training text, with which validation text may have changed
        checkpoint.check_validation(start, run.validation, config.resume_mismatch)
    needs = [(config.model, config.attention, vocab_size, phase.seq_len) for phase in phases]
    listeners = Callbacks([
        Watchdog(config.watchdog),
        Profile(config.profile, place.device),
        Speed(
            place.device, [sum(flops_per_token(*need).values()) for need in needs],
            [sum(dense_flops_per_token(*need).values()) for need in needs],
        ),
        Health(),
        Parity(config.check.parity_every, partial(check_parity, module)),
        SelfCheck(config.check, AttentionCheck(module, config.check.attention_tokens)),
        *([] if baseline is None else [BaselineCallback(baseline, mismatch=config.baseline_mismatch)]),
        Jsonl(),
        Wandb(config.logger),
        Console(),
    ])
    training = Training(run, engine, loader, Callbacks([
        listeners,
        Evaluate(config.eval, evaluation(config, place, corpus, engine, stop), listeners),
        Checkpoint(config.checkpoint, Saver(config.checkpoint, engine, place, tokenizer=corpus.tokenizer), listeners),
    ]))
    if place.rank == 0:  # not before nothing can rule the run out any more: it may put another run's folder aside
        checkpoint.tidy(config.directory, start)
        describe(config, zero, facts)
    barrier()
    return training


def resumed_loader(open_loader: Callable[..., RowLoader], run: RunState) -> RowLoader:
    """The loader where `run` stands; ValueError when its text is another one, which resume_mismatch=allow has it read from
    the beginning."""
    try:
        return open_loader(state=run.data)
    except ValueError as error:
        if run.data is None or run.config.resume_mismatch == "refuse":
            raise
        log.warning("%s; its text is read from the beginning, as resume_mismatch=allow says", error)
        run.data, run.tokens_before = None, run.tokens
        return open_loader(state=None)


def build_model(config: RunConfig, device: torch.device, vocab_size: int) -> Decoder:
    """The model on `device`, in fp32, with its initial weights; on the meta device without any."""
    with torch.device(device):
        module = Decoder(config.model, config.attention, vocab_size, config.loss)
    module.set_activation_checkpointing(config.activation_checkpointing, config.activation_offload)
    # On a CPU, and in plain PyTorch, attention reads the documents' lengths on the host: a gap in every layer's graph.
    whole = device.type == "cuda" and config.attention.impl not in ("sdpa", "reference")
    if config.compile is True or config.compile == "auto" and whole and config.zero.stage < 3:
        module.compile_layers(fullgraph=whole)
    if device.type != "meta":
        initialize(module, config.seed)
    return module


def describe(config: RunConfig, zero: dict[str, Any], facts: dict[str, Any]) -> None:
    """config.yaml, deepspeed.json and environment.json in the run's folder."""
    folder = config.directory
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False))
    _write(folder / "deepspeed.json", json.dumps(zero, indent=1) + "\n")
    _write(folder / "environment.json", json.dumps(facts, indent=1) + "\n")


def evaluation(config: RunConfig, place: Place, corpus: Corpus, engine: Engine, stop: StopSignal) -> Evaluation:
    """A function that measures the loss on the validation text of every source, in rows of the phase that the run is
    in: always the same text, spread over the ranks; and then the tasks of config.eval, on every rank. It calls what it
    is given after each micro-batch and task, and gives up with None when the run is to stop.

    ValueError already here when a text has not one row.
    """
    text = Text.of(corpus.tokenizer)
    bytes_of = text.bytes_of.to(place.device)
    alphabet = alphabet_of(text, corpus.tokenizer.vocab_size)
    predict = predictor(engine.predict, place.device)

    def batches(name: str, phase: Phase) -> Iterator[Batch]:
        rows = config.eval.rows and max(1, config.eval.rows * config.phases[0].seq_len // phase.seq_len)
        return validation_batches(
            corpus.validation[name], phase.seq_len, phase.micro_batch, rows, rank=place.rank,
            world_size=place.world_size, source=name if len(corpus.validation) > 1 else "", seq_len_key=phase.seq_len_key,
        )

    for phase in config.phases if config.eval.every else ():
        for name in corpus.validation:
            batches(name, phase)

    def cut(alive: Callable[[], None]) -> bool:
        alive()
        return any_rank(stop.requested is not None)

    def evaluate(run: RunState, alive: Callable[[], None]) -> dict[str, float] | None:
        phase, found = config.phases[run.phase], {}
        engine.enter(run.phase)
        total = PositionLoss(phase.seq_len, bytes_of)
        for name in corpus.validation:
            part = PositionLoss(phase.seq_len, bytes_of)
            for batch in batches(name, phase):
                batch = batch.to(place.device)
                token_loss, packing = engine.evaluate(batch)
                part.add(token_loss, batch.labels, packing.position)
                if cut(alive):
                    return None
            total.sums += sum_over_ranks(part.sums)
            if len(corpus.validation) > 1:
                found[f"eval/{name}/loss"] = part.metrics()["eval/loss"]
        for task in config.eval.tasks:  # on every rank alike: at stage 3 all have to take part
            found |= synthetic(
                task, predict, text, alphabet, config.eval.needle, config.eval.recall, config.seed,
                phase.micro_batch * phase.seq_len,
            ).metrics
            if cut(alive):
                return None
        return total.metrics() | found

    return evaluate


def _write(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.tmp")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)
