"""Another run's metrics, matched to ours by token count."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sieve.train.rundir import Row, RunFiles, differences

# What decides which tokens a run reads; other settings cannot change data/tokens_hash.
_DATA_KEYS = ("seed", "seq_len", "global_batch", "data.", "tokenizer.")


class BaselineMismatch(ValueError):
    """The run and its baseline have read different tokens, so their losses must not be compared."""


def steady(rows: list[Row], key: str) -> float | None:
    """Median of `key` over `rows` without the first tenth (one row at least), where compilation and warm-up lie."""
    values = [row[key] for row in rows if key in row]
    values = values[max(1, len(values) // 10):] or values
    return statistics.median(values) if values else None


@dataclass(frozen=True)
class Baseline:
    """The rows of a run by their token count. Only equal counts are compared: no interpolation, no nearest step, since
    on a falling loss a neighbour's is off by more than the gaps we look for."""

    run: RunFiles
    by_tokens: dict[int, Row]
    tokens_per_second: float | None

    @classmethod
    def read(cls, directory: Path) -> Baseline:
        """ValueError when the run has no metrics, or they lack the hash of its tokens."""
        run = RunFiles.read(directory)
        rows = {int(row["tokens"]): row for row in run.rows if "train/loss" in row and "tokens" in row}
        if not any("data/tokens_hash" in row for row in rows.values()):
            raise ValueError(f"baseline {directory} logged no data/tokens_hash: nobody can tell which tokens it read")
        return cls(run, rows, steady(run.rows, "perf/tokens_per_second"))

    @property
    def last_tokens(self) -> int:
        return max(self.by_tokens)

    def metrics(self, record: Row) -> dict[str, float]:
        """`baseline/*` of a record, whatever its tokens; empty when the baseline did not log this token count.

        loss_gap: nats, ours minus the baseline's. speedup: our tokens/s over the baseline's median.
        """
        row = self.by_tokens.get(int(record["tokens"]))
        if row is None:
            return {}
        found = {"baseline/loss": row["train/loss"], "baseline/loss_gap": record["train/loss"] - row["train/loss"]}
        if self.tokens_per_second and "perf/tokens_per_second" in record:
            found["baseline/speedup"] = record["perf/tokens_per_second"] / self.tokens_per_second
        return found

    def compare(self, record: Row, config: Mapping[str, object]) -> dict[str, float]:
        """`metrics`, after a check that both runs have read the same tokens; BaselineMismatch when they have not.

        config: our flat config, to name the keys that probably made the difference.
        """
        found = self.metrics(record)
        if not found:
            return {}
        ours, theirs = record.get("data/tokens_hash"), self.by_tokens[int(record["tokens"])].get("data/tokens_hash")
        if ours == theirs:
            return found
        keys = {
            key: pair for key, pair in differences(config, self.run.config).items() if key.startswith(_DATA_KEYS)
        }
        causes = ", ".join(f"{key} (here {here}, there {there})" for key, (here, there) in keys.items())
        raise BaselineMismatch(
            f"baseline={self.run.directory}: after {record['tokens']:,} tokens this run's data/tokens_hash is {ours}, "
            f"the baseline's {theirs}: they read different tokens, so a loss gap would mean nothing. "
            + (f"Settings that differ: {causes}. Use the baseline's" if causes else
               "No data setting differs, so the files or the tokenizer changed; train the baseline anew")
            + ", or pass baseline_mismatch=mark to log the gap all the same, marked by baseline/mismatch."
        )
