"""A spike in a run: passed over, told of with what makes its batch again, and the same after a resume."""

from __future__ import annotations

import json

from sieve.train.engine import Engine
from sieve.train.overrides import load_config
from sieve.train.run import run


def test_a_spike_is_passed_over_where_that_is_asked_for(tiny_text, one_rank, tmp_path, monkeypatch):
    original, seen = Engine.forward, []

    def forward(self, batch, **options):
        out = original(self, batch, **options)
        seen.append(batch)
        # Two micro-batches a step: the eleventh step's loss is far above what came before.
        return out._replace(ce_sum=out.ce_sum * 3) if (len(seen) - 1) // 2 == 10 else out

    monkeypatch.setattr(Engine, "forward", forward)

    def train(name: str, first: int, steps: int) -> list[dict]:
        seen[:] = [None] * (2 * first)
        config = load_config([
            *tiny_text, "attention=full", "eval=none", "checkpoint.every=0", f"runs_dir={tmp_path}",
            f"name={name}", f"steps={steps}",
            "guard.spikes=true", "guard.spike_window=8", "schedule.warmup=0", "schedule.decay=0", "optim.lr=1e-3",
        ])
        assert run(config) == 0
        return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]

    whole = train("whole", 0, 14)
    assert [row["train/skipped"] for row in whole] == [0] * 10 + [1] * 4
    (told,) = map(json.loads, (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines())
    assert told["step"] == 11 and told["why"] == "spike" and told["data"]["hash"] == whole[9]["data/tokens_hash"]
    assert told["documents"] and all(isinstance(name, str) for name in told["documents"])

    train("stopped", 0, 9)  # the window travels with the checkpoint
    stopped = train("stopped", 9, 14)
    assert [row["train/loss"] for row in stopped] == [row["train/loss"] for row in whole]
    assert [row["train/skipped"] for row in stopped] == [row["train/skipped"] for row in whole]
