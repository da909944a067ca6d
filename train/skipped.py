"""skipped.jsonl: one JSON object a skipped step, with what it takes to find the text that made it."""

from __future__ import annotations

import json
import logging
from typing import Any

from sieve.data.loader import Step
from sieve.train.state import RunState

log = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
_SHOWN = 8  # documents in the log's line; the file has all


def write_skipped(
    run: RunState, number: int, step: Step, why: str, loss: float, norm: float, before: dict[str, Any] | None
) -> None:
    """Log step `number`, which `run` has passed over, and append it to the run's file.

    why: loss, gradient or spike. before: the loader's state that makes this batch again.
    """
    if run.rank != 0:
        return
    documents = step.documents
    row = {
        "step": number, "why": why, "loss": loss, "grad_norm": norm, "documents": documents, "data": before,
        "tokens_hash": step.state.get("hash"),
    }
    shown = ", ".join(documents[:_SHOWN]) + (f" and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else "")
    log.warning(
        "step %d is skipped: loss %g, gradient norm %g (%s); its documents: %s; all of it in %s",
        number, loss, norm, "a spike" if why == "spike" else f"the {why} is not finite", shown or "unknown",
        run.directory / SKIPPED_FILE,
    )
    try:
        with (run.directory / SKIPPED_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", run.directory / SKIPPED_FILE, error.strerror)

