"""What a suite asks of a model and its documents, checked before the first task: later ones may be hours away."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sieve.eval.config import NEEDLES, NSA_TASKS, TEXT_TASKS, SuiteConfig
from sieve.eval.documents import Documents
from sieve.eval.load import Loaded
from sieve.eval.needle import check_lengths
from sieve.eval.recall import check_pairs
from sieve.model.nsa import NSA


def check_suite(model: Loaded, config: SuiteConfig, sources: Mapping[str, Documents], alphabet: Sequence[int]) -> None:
    """ValueError, with the task or key and what would do, for the first task that this model or these documents do not
    allow. sources: as of run_suite. alphabet: ids that the recall tasks draw of."""
    for task in config.suite:
        if task in TEXT_TASKS:
            _check_documents(task, sources)
        if task in NSA_TASKS:
            _check_nsa(task, model, config)
        elif task in NEEDLES:
            if model.text is None:
                raise ValueError(f"{task} needs the model's tokenizer")
            for own in sources.values():
                own(2)  # a file that is not there; hay may be short
            bos = [] if model.text.bos_id is None else [model.text.bos_id]
            check_lengths(config.needle, model.text.encode, bos, config.seed, task)
        elif task == "mqar":
            check_pairs(config.recall, alphabet)
        elif task == "harness":
            from sieve.eval.harness import check_harness

            check_harness(model, config.harness)


def _check_documents(task: str, sources: Mapping[str, Documents]) -> None:
    if not sources:
        raise ValueError(f"{task} needs text: give loss.source=[FILE, ...] or a run, whose validation text it takes")
    for name, own in sources.items():
        if next(iter(own(None)), None) is None:
            raise ValueError(f"{task}: no document of {name} has two tokens or more; give others with loss.source")


def _check_nsa(task: str, model: Loaded, config: SuiteConfig) -> None:
    if not any(isinstance(layer.attention, NSA) for layer in model.decoder.layers):
        rest = [other for other in config.suite if other not in NSA_TASKS]
        instead = f"leave it out, as suite=[{','.join(rest)}]" if rest else "leave it out of suite"
        raise ValueError(f"{task} is about NSA, and {model.name} has no NSA layer; {instead}")
    geometry = model.decoder.attention_config.geometry()
    for topk in config.health.larger_topk if task == "switches" else ():
        try:
            dataclasses.replace(geometry, topk=topk)
        except ValueError as error:
            raise ValueError(f"health.larger_topk has {topk}: {error}") from error
