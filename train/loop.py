"""The training loop: one for every model, attention and number of processes."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from sieve.data.loader import Step
from sieve.train import schedule
from sieve.train.callbacks.callback import Callback
from sieve.train.distributed import Place, any_rank, sum_over_ranks
from sieve.train.engine import Engine
from sieve.train.signals import StopSignal
from sieve.train.state import RunState

log = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; nothing of that step has been saved."""


def train(
    run: RunState, engine: Engine, loader: Iterator[Step], callbacks: Callback, stop: StopSignal, place: Place
) -> str:
    """Train `run` from where it stands to its end, or until `stop` is set; returns finished or stopped.

    The callbacks see every step, and the end also when an error ends it. Raises NonFiniteLoss.
    """
    status = "failed"
    callbacks.start(run)
    try:
        while run.step < run.total_steps and not run.stopping:
            step = next(loader)
            if step.phase != run.phase:
                log.info("data.phases[%d] begins after step %d, %d tokens", step.phase - 1, run.step, run.tokens)
            logged = (run.step + 1) % run.config.log.every == 0 or run.step + 1 == run.total_steps
            record = train_step(run, engine, step, place, logged)
            run.stopping = any_rank(stop.requested is not None) and run.step < run.total_steps
            callbacks.step(run, record)
        status = "stopped" if run.stopping else "finished"
    finally:
        callbacks.end(run, status)
    return status


def train_step(run: RunState, engine: Engine, step: Step, place: Place, logged: bool) -> dict | None:
    """One optimizer step on a global batch; `run` stands behind it afterwards. Its record if `logged`, else None.

    The loss is the sum of the cross entropy over the labelled tokens of the whole global batch over their number, so
    that it does not depend on how rows are spread over micro-batches and ranks.
    """
    cross_entropy = torch.zeros((), dtype=torch.float64, device=place.device)
    load: dict[int, Tensor] = {}
    health: defaultdict[str, list[Tensor]] = defaultdict(list)
    engine.enter(step.phase, len(step.micro_batches))
    for batch in step.micro_batches:
        out = engine.forward(batch.to(place.device), collect=logged)
        engine.backward(out.loss_sum / step.labelled)
        cross_entropy += out.ce_sum
        for layer, tokens in out.expert_load.items():
            load[layer] = load[layer] + tokens if layer in load else tokens
        for name, value in out.health.items():
            health[name].append(value)
    lr = run.config.optim.lr * schedule.ratio(run.config.schedule, run.step + 1, run.total_steps)
    norm = engine.update(lr)
    for tokens in load.values():
        sum_over_ranks(tokens)
    engine.module.update_router_bias(load)
    loss = sum_over_ranks(cross_entropy).item() / step.labelled
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"step {run.step + 1}: the loss is {loss}, with a gradient norm of {float(norm)} and optim.lr={lr:g}; "
            "nothing of this step is saved. Lower optim.lr, or lengthen schedule.warmup"
        )
    run.step += 1
    run.tokens = step.state["tokens"]
    run.data = step.state
    if not logged:
        return None
    run.expert_load = load
    run.router_bias = {layer: engine.module.layers[layer].mlp.router.bias for layer in load}
    run.health = {name: _mean_of_known(values) for name, values in health.items()}
    return {
        "step": run.step,
        "tokens": run.tokens,
        "train/loss": loss,
        "train/grad_norm": float(norm),
        "train/lr": lr,
        "data/tokens_hash": step.state["hash"],
        "data/epoch": step.epoch,
        **step.metrics,
    }


def _mean_of_known(values: list[Tensor]) -> Tensor:
    """Over the micro-batches of all ranks, those left out that are NaN: see sieve.model.health.unknown_health."""
    found = torch.stack(values).float()
    total, count = sum_over_ranks(torch.stack([found.nansum(), (~found.isnan()).sum().float()]))
    return total / count
