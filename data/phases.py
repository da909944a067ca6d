"""The schedule of a run: what holds from which token on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sieve.data.config import DataConfig

ONLY = "text"  # the name of a run's source where there is no mixture


@dataclass(frozen=True)
class Phase:
    """What a run reads from its `from_tokens`-th token on, counted over all ranks with padding, until the next phase.

    seq_len: tokens a row; global_batch, micro_batch: in rows. packing: a name of sieve.data.stream.PACKERS.
    weights: by source, their ratio is that of the tokens read, padding left out. upsample: by source, from a length in
    tokens on, how many times as often its documents are read. rope_factor: for the model, see PhaseConfig. seq_len_key: the
    setting that gave seq_len, for messages.
    """

    from_tokens: int
    seq_len: int
    global_batch: int
    micro_batch: int
    packing: str = "concatenate"
    weights: Mapping[str, float] = field(default_factory=dict)
    upsample: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    rope_factor: float = 1.0
    seq_len_key: str = field(default="seq_len", compare=False)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len


def phases_of(data: DataConfig, *, seq_len: int, global_batch: int, micro_batch: int) -> tuple[Phase, ...]:
    """The run from its first token with these sizes, then the phases that `data` describes."""
    own = data.sources or {ONLY: data}
    phase = Phase(
        0, seq_len, global_batch, micro_batch, data.packing,
        {name: getattr(source, "weight", 1.0) for name, source in own.items()},
        {name: source.upsample for name, source in own.items()},
    )
    found = [phase]
    for i, given in enumerate(data.phases):
        changed = {key: value for key in type(given).model_fields if (value := getattr(given, key)) is not None}
        if "upsample" in changed:
            changed["upsample"] = dict.fromkeys(own, changed["upsample"])
        if "seq_len" in changed:
            changed["seq_len_key"] = f"data.phases[{i}].seq_len"
        phase = replace(phase, **changed)
        found.append(phase)
    return tuple(found)


def phase_at(phases: Sequence[Phase], tokens: int) -> int:
    """The index of the phase in which the step after `tokens` tokens lies; phases begin with a step."""
    return max(i for i, phase in enumerate(phases) if phase.from_tokens <= tokens)


def steps_for(phases: Sequence[Phase], tokens: int) -> int:
    """How many steps it takes to read at least `tokens` tokens."""
    steps = done = 0
    for phase, following in zip(phases, [*phases[1:], None]):
        end = tokens if following is None else min(tokens, following.from_tokens)
        taken = max(0, math.ceil((end - done) / phase.tokens_per_step))
        steps, done = steps + taken, done + taken * phase.tokens_per_step
    return steps
