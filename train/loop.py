"""The training loop: one for every model, attention and number of processes."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from sieve.data.loader import Step
from sieve.data.packing import beginnings
from sieve.kernels.common.ranges import named
from sieve.model.balance import sample
from sieve.model.config import MoEConfig
from sieve.train import schedule
from sieve.train.callbacks.callback import Callback
from sieve.train.distributed import Place, concat_over_ranks, sum_over_ranks
from sieve.train.engine import Engine
from sieve.train.guard import Guard
from sieve.train.outcome import Ledger, Outcome, to_host
from sieve.train.signals import SaveRequest, StopSignal
from sieve.train.state import RunState

log = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """Step after step the loss or a gradient is no finite number; the state before them is saved."""


def train(
    run: RunState, engine: Engine, loader: Iterator[Step], callbacks: Callback, stop: StopSignal, place: Place
) -> str:
    """Train `run` from where it stands to its end, or until `stop` is set; returns finished or stopped.

    The callbacks see every step, and the end also when an error ends it. Raises NonFiniteLoss.
    """
    status = "failed"
    ledger = Ledger(Guard(run.config.guard, run.guard), lag=place.device.type == "cuda" and not run.config.guard.spikes)
    request = SaveRequest(run.directory / "save")
    callbacks.start(run)
    try:
        while run.step < run.total_steps and not run.ending:
            with named("step"):
                with named("data"):
                    step = next(loader)
                if step.phase != run.phase:
                    log.info("data.phases[%d] begins after step %d, %d tokens", step.phase - 1, run.step, run.tokens)
                logged = (run.step + 1) % run.config.log.every == 0 or run.step + 1 == run.total_steps
                outcome = train_step(run, engine, step, place, ledger.guard, logged)
            asked = torch.tensor([float(stop.requested is not None), float(place.rank == 0 and request.take())])
            stopping, run.save_requested = (count > 0 for count in sum_over_ranks(asked).tolist())
            run.stopping = stopping and run.step < run.total_steps
            saved = run.save_requested or run.config.checkpoint.due(run.step)  # with what is known of all steps up to it
            ledger.add(run, outcome, now=logged or saved or run.ending)
            callbacks.step(run, outcome.record)
            if run.failure is not None:
                raise NonFiniteLoss(run.failure)
        status = "stopped" if run.stopping else "finished"
    finally:
        callbacks.end(run, status)
    return status


def train_step(run: RunState, engine: Engine, step: Step, place: Place, guard: Guard, logged: bool) -> Outcome:
    """One optimizer step on a global batch; `run` stands behind it afterwards. Its outcome, with a record if `logged`.

    The loss is the sum of the cross entropy over the labelled tokens of the whole global batch over their number, so
    that it does not depend on how rows are spread over micro-batches and ranks. When it, or the gradient, is no finite
    number, or `guard` takes it for a spike, the batch is passed over: weights, optimizer and balancing stay as they
    are. That is decided on the device, and the host does not wait for it here.
    """
    cross_entropy = torch.zeros((), dtype=torch.float64, device=place.device)
    load: dict[int, Tensor] = {}
    scores: defaultdict[int, list[Tensor]] = defaultdict(list)
    health: defaultdict[str, list[Tensor]] = defaultdict(list)
    share = _tokens_to_balance_by(run.config.model.moe, len(step.micro_batches) * place.world_size)
    engine.enter(step.phase, len(step.micro_batches))
    for batch in step.micro_batches:
        with named("forward"):
            batch = batch.to(place.device)
            out = engine.forward(batch, collect=logged)
        with named("backward"):
            engine.backward(out.loss_sum / step.labelled)
        cross_entropy += out.ce_sum
        for layer, tokens in out.expert_load.items():
            load[layer] = load[layer] + tokens if layer in load else tokens
        for layer, some in out.router_sample.items():
            scores[layer].append(sample(some, share))
        for name, value in out.health.items():
            health[name].append(value)
    lr = run.config.optim.lr * schedule.ratio(run.config.schedule, run.step + 1, run.total_steps)
    sum_over_ranks(cross_entropy)
    with named("optimizer"):
        norm = engine.update(lr, cross_entropy / step.labelled, guard.limit())
    for tokens in load.values():
        sum_over_ranks(tokens)
    # Equal loads move no bias, nor do scores of no token: nothing is balanced in a step that is skipped.
    if scores and run.step < run.config.model.moe.bias_settle:
        share = _tokens_to_balance_by(run.config.model.moe, place.world_size)
        some_of_all = beginnings(step.micro_batches).to(place.device)
        engine.settle(some_of_all, lambda some: _of_all_ranks({0: [sample(some, share)]}, engine.skipped)[0])
    else:
        engine.module.update_router_bias(
            {layer: tokens * ~engine.skipped for layer, tokens in load.items()}, _of_all_ranks(scores, engine.skipped),
        )
    before = run.data
    run.step += 1
    run.tokens = run.tokens_before + step.state["tokens"]
    run.data = step.state
    record = None
    for layer, tokens in load.items():
        run.load_since[layer] = run.load_since.get(layer, 0) + tokens
    if logged:
        run.expert_load, run.load_since, run.step_load = run.load_since, {}, load
        run.router_bias = {layer: engine.module.layers[layer].mlp.router.bias for layer in load}
        run.health = {name: _mean_of_known(values) for name, values in health.items()}
        record = {"step": run.step, "tokens": run.tokens}
    return Outcome(run.step, step, before, lr, record, *to_host(torch.stack([cross_entropy, engine.skipped, norm.double()])))


def _tokens_to_balance_by(moe: MoEConfig | None, parts: int) -> int:
    """How many of one micro-batch, of `parts` on all ranks."""
    return 1 if moe is None else max(moe.bias_tokens // parts, 1)


def _of_all_ranks(scores: dict[int, list[Tensor]], skipped: Tensor) -> dict[int, Tensor]:
    """By layer [n, E], the micro-batches' [., E] of all ranks end to end; where `skipped`, of no token."""
    if not scores:
        return {}
    own = torch.stack([torch.cat(parts) for parts in scores.values()]).masked_fill(skipped, math.nan)
    return dict(zip(scores, concat_over_ranks(own, dim=1)))


def _mean_of_known(values: list[Tensor]) -> Tensor:
    """Over the micro-batches of all ranks, those left out that are NaN: see sieve.model.health.unknown_health."""
    found = torch.stack(values).float()
    total, count = sum_over_ranks(torch.stack([found.nansum(), (~found.isnan()).sum().float()]))
    return total / count
