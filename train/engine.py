"""DeepSpeed, behind the four calls that training needs. No other file imports it."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sieve.data.packing import Batch
from sieve.kernels.nsa.layout import Packing
from sieve.model.config import RopeConfig
from sieve.model.decoder import Decoder, DecoderOutput
from sieve.model.init import drawn
from sieve.train import partition
from sieve.train.distributed import Place, sum_over_ranks
from sieve.train.partition import Piece
from sieve.train.skip import SkippableAdamW, is_bad


class Engine:
    """A Decoder under ZeRO: forward, backward and update, and its state in pieces.

    module: in fp32, on any device; it moves to place.device and, in bf16, is cast there. optimizer: over its
        parameters. config: of sieve.train.zero.deepspeed_config. clip: largest gradient norm, 0 for none.
    skipped: whether the last update was, a bool scalar on the device.
    initial: the fp32 values of the parameter of a name and shape, to which bf16 training sets its master weights; it is
        called from several threads.
        DeepSpeed would take them from the parameters after rounding them to bf16.
    ropes: the model's rotary embedding in each phase; none: the module's own.
    on_device: clip and skip by scalars that AdamW's fused kernel reads, so that the host never waits for the norm; in bf16
        at stages 1 and 2. None: on a GPU.
    """

    def __init__(
        self, module: Decoder, optimizer: SkippableAdamW, config: dict[str, Any], place: Place, *,
        clip: float, initial: Callable[[str, torch.Size], Tensor], ropes: Sequence[RopeConfig] = (),
        on_device: bool | None = None,
    ) -> None:
        self.module, self._adamw, self._ropes = module, optimizer, ropes
        self._micro_batches, self._done = config["gradient_accumulation_steps"], 0  # of a step
        self.skipped = torch.zeros((), dtype=torch.bool, device=place.device)
        self.before_update: Callable[[], None] = lambda: None  # called before anything of `pieces` is changed
        self._stage, self._clip, self._place = config["zero_optimization"]["stage"], clip, place
        on_device = place.device.type == "cuda" if on_device is None else on_device
        self._on_device = on_device and config["bf16"]["enabled"] and self._stage < 3
        deepspeed = _import_deepspeed(place)
        with _quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if self._on_device and self._stage == 1:
            # Its step would wait for the norm, to skip what AdamW is told to skip, and copies a scalar to mark a bad one.
            its = sys.modules["deepspeed.runtime.bf16_optimizer"]
            its.is_invalid_grad_norm = lambda norm: False
            its.get_global_norm_of_tensors = lambda input_tensors, **_: _norm_of(input_tensors)
            self._optimizer.update_hp_grads = self._accumulate
        if config["bf16"]["enabled"]:
            self._set_masters(initial)

    @torch.no_grad()
    def _accumulate(self, clear_lp_grads: bool = False) -> None:
        """Add a backward's gradients to those in fp32: the sums that DeepSpeed makes, without its copies in fp32, and without
        zeros that the next backward would have to add to."""
        its = self._optimizer
        for sums, known, parameters in zip(its.fp32_groups_gradients, its.fp32_groups_has_gradients, its.bf16_groups):
            found = [i for i, p in enumerate(parameters) if p.grad is not None]
            if found:
                torch._foreach_add_([sums[i] for i in found], [parameters[i].grad.view_as(sums[i]) for i in found])
            for i in found:
                known[i], parameters[i]._hp_grad, parameters[i].grad = True, sums[i], None

    def _set_masters(self, initial: Callable[[str, torch.Size], Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        # ZeRO-3 leaves an empty tensor behind.
        names = ((name, getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in self.module.named_parameters())
        for parameter, value in zip(self.module.parameters(), drawn(names, initial)):
            safe_set_full_fp32_param(parameter, value.to(self._place.device))

    def enter(self, phase: int, micro_batches: int | None = None) -> None:
        """What follows belongs to `phase`; micro_batches: how many this rank's next step has."""
        if self._ropes:
            self.module.set_rope(self._ropes[phase])
        if micro_batches is not None:
            self._micro_batches = micro_batches

    def forward(self, batch: Batch, *, collect: bool = False) -> DecoderOutput:
        """The training forward of a batch on place.device. Every rank has to call it as often as the others."""
        packing = Packing.of(batch.cu_seqlens, batch.tokens.numel(), batch.max_seqlen)
        return self._engine(batch.tokens, batch.labels, packing, padding=batch.padding, collect=collect)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Packing]:
        """token_loss [B, S] of the batch (see DecoderOutput), and its packing."""
        packing = Packing.of(batch.cu_seqlens, batch.tokens.numel(), batch.max_seqlen)
        self.module.eval()
        out = self.module(batch.tokens, batch.labels, packing, per_token=True)
        self.module.train()
        return out.token_loss, packing

    @torch.no_grad()
    def settle(self, batch: Batch, whole: Callable[[Tensor], Tensor]) -> None:
        """Set the routers' biases by a forward of `batch`, on place.device, with the weights as they are now (see
        Decoder.settling). Every rank calls it."""
        packing = Packing.of(batch.cu_seqlens, batch.tokens.numel(), batch.max_seqlen)
        first = torch.zeros(1, dtype=torch.int64, device=self._place.device)
        self.module.eval()
        with self.module.settling(whole):
            self.module(batch.tokens, None, packing, padding=batch.padding, at=first)
        self.module.train()

    @torch.no_grad()
    def predict(self, tokens: Tensor, packing: Packing, at: Tensor) -> Tensor:
        """Next-token logits [n, vocab] at the places `at` of tokens [1, T]. Every rank calls it with the same."""
        self.module.eval()
        logits = self.module(tokens, None, packing, at=at)
        self.module.train()
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's `loss`. They are those of the sum over micro-batches and ranks: whoever
        wants a mean divides by the count of the whole global batch."""
        self._done += 1
        # Told explicitly, for DeepSpeed's own count goes wrong where steps have other numbers of micro-batches.
        self._engine.set_gradient_accumulation_boundary(self._done == self._micro_batches)
        # DeepSpeed averages over ranks, and over micro-batches unless told not to.
        self._engine.backward(loss * self._place.world_size, scale_wrt_gas=False)
        if self._done < self._micro_batches:
            self._engine.step()  # after every micro-batch, or it loses count

    def update(self, lr: float, loss: Tensor | None = None, limit: float = math.inf) -> Tensor:
        """One optimizer step after the last micro-batch, skipped when `loss` or a gradient is no finite number, or
        `loss` is above `limit`: neither weights nor the optimizer's state are touched then.

        loss: scalar, equal on all ranks; None: only gradients are looked at. Returns the gradient norm before clipping,
        a scalar; `skipped` says what became of the step.
        """
        if self._done != self._micro_batches:
            raise RuntimeError("update() before the last micro-batch of a global batch has had its backward()")
        self._done = 0
        self.before_update()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self._place.device) if loss is None else loss
        if self._on_device:
            norm = self._norm_of_gradients() if self._stage == 2 else None

            def judge() -> Tensor:
                found = self._norm() if norm is None else norm
                if self._clip:
                    self._adamw.grad_scale = ((found + 1e-6) / self._clip).clamp(min=1.0)
                return is_bad(loss, found, limit)

            self._adamw.should_skip = judge
            self._engine.step()
            norm = self._norm() if norm is None else norm
        elif self._stage:
            self._adamw.should_skip = lambda: is_bad(loss, self._norm(), limit)
            self._engine.step()  # at stage 3 and in fp32 DeepSpeed itself skips when the norm is no number
            norm = self._norm()
        else:
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip or float("inf"))
            self._adamw.should_skip = lambda: is_bad(loss, norm, limit)
            self._engine.step()
        self.skipped = is_bad(loss, norm, limit)
        return norm

    def _norm_of_gradients(self) -> Tensor:
        """Of the whole model's, from the parts that ZeRO's stage 2 leaves on the ranks, worked out on the device alone."""
        parts = [g for group in self._optimizer.averaged_gradients.values() for g in group or ()]
        norm = _norm_of(parts)
        return sum_over_ranks(norm.square()).sqrt() if self._place.world_size > 1 else norm

    def _norm(self) -> Tensor:
        return torch.as_tensor(self._optimizer._global_grad_norm, device=self._place.device)

    def pieces(self) -> list[Piece]:
        """What this process holds of the weights and of the optimizer's state: views, good until the next step."""
        return partition.pieces(self._stage, self.module, self._optimizer, self._adamw)

    @property
    def replicated(self) -> bool:
        """Whether `pieces` are the same on all ranks, else a part of the whole on each."""
        return self._stage == 0

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the model compute with what has been written into `pieces`; all ranks together."""
        with _quiet():
            partition.refresh(self._stage, self._optimizer)

    def close(self) -> None:
        """Let go of hooks and buffers."""
        self._engine.destroy()


def _norm_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def _import_deepspeed(place: Place) -> Any:
    if place.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it looks for one, and says so
    # What a launcher would have set. It reads them whenever it likes; without RANK at the start it asks for mpi4py.
    for name, value in (("RANK", place.rank), ("LOCAL_RANK", place.local_rank), ("WORLD_SIZE", place.world_size)):
        os.environ.setdefault(name, str(value))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if place.device.type == "cpu":
        # Its shared-memory op is compiled with g++ for a minute at first use and gains nothing here.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    warnings.filterwarnings("ignore", ".*(reduce_scatter_tensor|all_gather_into_tensor).*", FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It prints memory statistics and file names, and collects garbage before each, over all that was ever imported:
    half a second each time, unless what is there is taken out of the collector's sight."""
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()
