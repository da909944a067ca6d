"""The sequence of rows of a run: which source's turn it is, what its row holds, and a state of a few integers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sieve.data.apportion import choose, whole
from sieve.data.best_fit import BestFit
from sieve.data.buckets import Bucket, factor, split
from sieve.data.packers import Concatenate, Cursor, OneDocument, Packer, RowPlan
from sieve.data.phases import Phase, phase_at
from sieve.data.tokens import Tokens

PACKERS: dict[str, Callable[[Bucket], Packer]] = {
    "concatenate": Concatenate, "best_fit": BestFit, "document": OneDocument,
}


@dataclass(frozen=True)
class StepPlan:
    """rows: of one global step, in global order, each with its bucket. phase: its index. state: after the step, its
    hash not yet known."""

    rows: list[tuple[Bucket, RowPlan]]
    phase: int
    state: dict[str, Any]


class Stream:
    """Plans the rows of a run, step by step; a pure function of the sources, the phases, the seed and the state.

    A row belongs to one bucket. Within a phase each bucket gets its share of the tokens, exact up to a row at every
    point (see `choose`). A bucket has a share of its source's weight by its tokens times its upsampling factor.

    State, JSON-able: tokens (of all rows so far, padding included), hash, phase (of the last step), seed, sources (by
    name, their id), and by bucket its cursor, `given` (tokens in this phase) and `tokens` (in the run).
    """

    def __init__(self, sources: Mapping[str, Tokens], phases: Sequence[Phase], seed: int):
        """Raises ValueError where a phase cannot be served: a source has too few tokens for a row, or none that the
        phase's upsampling leaves."""
        self.phases, self._sources, self._seed = list(phases), dict(sources), seed
        self.buckets = [
            bucket for name, tokens in sources.items()
            for bucket in split(name, tokens, seed, [phase.upsample.get(name, {}) for phase in phases])
        ]
        self._shares = [self._whole_shares(index) for index in range(len(phases))]
        self._packers = [{name: make(bucket) for name, make in PACKERS.items()} for bucket in self.buckets]

    def start(self) -> dict[str, Any]:
        """The state before the first step."""
        return {
            "tokens": 0, "hash": "", "phase": 0, "seed": self._seed,
            "sources": {name: tokens.id for name, tokens in self._sources.items()},
            "buckets": {b.name: {"cursor": list(Cursor()), "given": 0, "tokens": 0} for b in self.buckets},
        }

    def checked(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of `state`. ValueError if it belongs to other sources, another seed or other phases, or is damaged."""
        start = self.start()
        missing = sorted(set(start) - set(state))
        if missing:
            raise ValueError(
                f"the data state lacks {', '.join(missing)}; it has {', '.join(sorted(state)) or 'nothing'}"
            )
        for key, fix in (
            ("sources", "the training text, its tokenizer or the mixture changed; restore them, or start a new run"),
            ("seed", "another seed is another order; restore it, or start a new run"),
        ):
            if state[key] != start[key]:
                raise ValueError(f"cannot resume: the data state has {_differing(key, state[key], start[key])}; {fix}")
        if set(state["buckets"]) != set(start["buckets"]):
            raise ValueError(
                f"cannot resume: the data state has the buckets {', '.join(state['buckets'])}, this run "
                f"{', '.join(start['buckets'])}; data.upsample or its phases changed: restore them, or start a new run"
            )
        for bucket in self.buckets:
            cursor = Cursor(*state["buckets"][bucket.name]["cursor"])
            if min(cursor) < 0 or cursor.position >= bucket.num_documents:
                raise ValueError(
                    f"the data state's {cursor} is outside of {bucket.num_documents} documents of {bucket.name}; it is "
                    "damaged"
                )
        if not 0 <= state["phase"] < len(self.phases):
            raise ValueError(f"the data state has phase {state['phase']}, this run {len(self.phases)} phases")
        return {key: copy.deepcopy(state[key]) for key in start}

    def plan(self, state: Mapping[str, Any]) -> StepPlan:
        """The step that begins at `state`, which is left as it is."""
        index = phase_at(self.phases, state["tokens"])
        phase, weights = self.phases[index], self._shares[index]
        kept = [state["buckets"][bucket.name] for bucket in self.buckets]
        cursors = [Cursor(*entry["cursor"]) for entry in kept]
        given = [entry["given"] for entry in kept]
        if index != state["phase"]:
            given = [0] * len(given)
            before = self.phases[state["phase"]]
            if (before.packing, before.seq_len) != (phase.packing, phase.seq_len):
                cursors = [p[before.packing].settled(c, before.seq_len) for p, c in zip(self._packers, cursors)]
        packers = [by_name[phase.packing] for by_name in self._packers]
        first, rows = given.copy(), []
        for _ in range(phase.global_batch):
            i = choose(weights, given, phase.seq_len) if len(given) > 1 else 0
            row, cursors[i] = packers[i].row(cursors[i], phase.seq_len)
            given[i] += row.tokens
            rows.append((self.buckets[i], row))
        buckets = {
            bucket.name: {"cursor": list(cursors[i]), "given": given[i], "tokens": kept[i]["tokens"] + given[i] - first[i]}
            for i, bucket in enumerate(self.buckets)
        }
        after = {**state, "tokens": state["tokens"] + phase.tokens_per_step, "phase": index, "buckets": buckets}
        return StepPlan(rows, index, after)

    def _whole_shares(self, index: int) -> list[int]:
        """The buckets' shares of phase `index`, as integers."""
        phase = self.phases[index]
        shares = []
        for name, tokens in self._sources.items():
            weight = Fraction(str(phase.weights.get(name, 1.0)))
            own = [b for b in self.buckets if b.source == name]
            factors = [Fraction(str(factor(phase.upsample.get(name, {}), b.low))) for b in own]
            amounts = [b.num_tokens * times for b, times in zip(own, factors)]
            if weight and not sum(amounts):
                raise ValueError(
                    f"{self._called(index)} reads {name}, but upsample={dict(phase.upsample[name])} leaves none "
                    f"of its {tokens.num_documents} documents; give a lower bound, or the source no weight"
                )
            if weight and sum(b.num_tokens for b, a in zip(own, amounts) if a) < phase.seq_len:
                raise ValueError(
                    f"{phase.seq_len_key}={phase.seq_len}, but {_text_of(name, len(self._sources))} has {tokens.num_tokens} "
                    f"tokens in {tokens.num_documents} documents, less than one row; lower {phase.seq_len_key}, or give more "
                    "text (data.paths, data.max_bytes)"
                )
            shares += [weight * amount / (sum(amounts) or 1) for amount in amounts]
        if not any(shares):
            raise ValueError(f"{self._called(index)} gives no source any weight; give one")
        return whole(shares)

    @staticmethod
    def _called(index: int) -> str:
        return f"data.phases[{index - 1}]" if index else "the run's beginning"


def _text_of(name: str, sources: int) -> str:
    return "the training text" if sources == 1 else f"the training text of {name}"


def _differing(key: str, then: Any, now: Any) -> str:
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return f"{key}={then}, this run {now}"
    names = sorted(n for n in {*then, *now} if then.get(n) != now.get(n))
    return ", ".join(f"{key}.{n}={then.get(n, 'nothing')}, this run {now.get(n, 'nothing')}" for n in names)
