"""What of the model and the engine follows the phases of a run's data."""

from __future__ import annotations

from collections.abc import Sequence

from sieve.data.phases import Phase
from sieve.model.config import RopeConfig, RopeScaling


def ropes(rope: RopeConfig, phases: Sequence[Phase]) -> list[RopeConfig]:
    """The rotary embedding of each phase: `rope`, stretched by YaRN where the phase has a rope_factor above 1.

    A model that is stretched from the start keeps the length it was stretched from.
    """
    original = rope.scaling.original_seq_len if rope.scaling else phases[0].seq_len
    scaling = {} if rope.scaling is None else rope.scaling.model_dump()
    return [
        rope if phase.rope_factor == 1
        else rope.model_copy(update={
            "scaling": RopeScaling(**{**scaling, "factor": phase.rope_factor, "original_seq_len": original}),
        })
        for phase in phases
    ]
