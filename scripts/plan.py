"""`sieve plan`: parameters, FLOPs, memory and speed of a run before it is started, and one measured beside the prediction."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sieve.train.command import describe_keys, run_command
from sieve.train.plan import DAY, GB, PlanConfig, plan

USAGE = """\
usage: sieve plan [KEY=VALUE | GROUP=CHOICE ...] [--measure] [--json FILE] [--cfg job] [--help]

Parameters, FLOPs a token, memory a rank and predicted speed of what `sieve train` would do with the same overrides.
Nothing is built. The vocabulary is tokenizer.vocab_size; tokens=N is the budget. Beside train's keys: gpus, gpu,
gpu_memory_gb, gpus_per_node, network_gb. Speeds need dtype=bf16.

  --measure    also run a few steps of one rank on synthetic rows on the device here, and print them beside the prediction
  --json FILE  write everything to FILE

  sieve plan model=1b attention=nsa dtype=bf16 seq_len=8192 gpus=8 tokens=20e9
  sieve plan model=nsa-27b attention=nsa dtype=bf16 gpus=64 zero=3 seq_len=8192 global_batch=512 tokenizer.vocab_size=102400
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; 1 when --measure could not; 2 after a message for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        measure, out, overrides = _options(arguments)
    except ValueError as error:
        print(f"sieve plan: {error}", file=sys.stderr)
        return 2

    def run(config: PlanConfig) -> int:
        found, code = plan(config), 0
        print("\n".join(lines(found)))
        if measure:
            from sieve.scripts.plan_measure import measure_phases, measured_lines

            found["measured"] = measure_phases(config, overrides)
            print("\n".join(["", *measured_lines(found["measured"])]))
            code = int(any("error" in phase for phase in found["measured"]["phases"]))
        if out is not None:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(found | {"command": ["sieve", "plan", *arguments]}, indent=1) + "\n")
            except OSError as error:
                raise ValueError(f"--json {out} cannot be written ({error.strerror}); give another file") from error
        return code

    return run_command("sieve plan", overrides, load=_load, run=run, help_text=help_text)


def help_text() -> str:
    return describe_keys(USAGE, PlanConfig, "config")


def _load(overrides: list[str]) -> PlanConfig:
    from sieve.train.overrides import load

    return load(PlanConfig, "config", overrides, PlanConfig.of)


def _options(arguments: list[str]) -> tuple[bool, Path | None, list[str]]:
    """Whether --measure is given, the file of --json, and the rest."""
    rest, out = [a for a in arguments if a != "--measure"], None
    if "--json" in rest:
        at = rest.index("--json")
        if at + 1 == len(rest) or "=" in rest[at + 1] or rest[at + 1].startswith("-"):
            raise ValueError("--json wants a file after it, as in --json plan.json")
        out, rest = Path(rest[at + 1]), rest[:at] + rest[at + 2 :]
    return "--measure" in arguments, out, rest


def lines(found: dict[str, Any]) -> list[str]:
    """What `plan` found, to be read."""
    count = found["parameters"]
    text = [f"parameters: {count['total']:,} total, {count['active']:,} active"]
    text.append("  " + ", ".join(f"{part} {number:,}" for part, number in count["by_part"].items() if number))
    for number, phase in enumerate(found["phases"]):
        text += ["", *_phase_lines(found, phase, f"phase {number}: " if len(found["phases"]) > 1 else "")]
    total = found["total"]
    text.append("")
    if total["seconds"] is None:
        text.append("no speed is predicted for dtype=fp32: the figures are of bf16; add dtype=bf16 zero=1")
    else:
        text.append(
            f"{total['tokens']:,} tokens in {total['steps']:,} steps, {total['flops']:.3g} FLOPs: {total['days']:.3g} days "
            f"on {found['gpus']} {found['gpu']} ({total['seconds'] / 3600 * found['gpus']:.4g} GPU hours)"
        )
    if found["figures"]:
        text += ["", "figures:"]
        for name, figure in found["figures"].items():
            value = "" if figure["value"] is None else f" {figure['value']:.4g}"
            text.append(f"  {name}:{value} ({figure['source']})")
    return [*text, "", "assumptions:", *(f"  {line}" for line in found["assumptions"])]


def _phase_lines(found: dict[str, Any], phase: dict[str, Any], name: str) -> list[str]:
    flops = phase["flops_per_token"]
    text = [
        f"{name}{phase['seq_len']} tokens a row, micro_batch {phase['micro_batch']}, {phase['micro_batches']} a step and rank: "
        f"{sum(flops.values()) / 1e9:.3f} GFLOPs a token ({phase['dense_flops_per_token'] / 1e9:.3f} with full attention)",
        "  " + ", ".join(f"{part} {value / 1e9:.3f}" for part, value in flops.items()),
        f"  {'GB a rank':10} {'mode':9}" + "".join(f" {n:>8}" for n in ("states", "kept", "work", "sum"))
        + f" {'tokens/s':>11}  longest row, largest micro-batch",
    ]
    for row in phase["memory"]:
        figures = "".join(f" {row[name] / GB:8.2f}" for name in ("states", "kept", "work", "total"))
        rate = f"{row['speed']['tokens_per_second']:,.0f}" if row["speed"] else "-"
        own = (row["stage"], row["mode"]) == (found["zero"], found["activation_checkpointing"])
        name = f"{'>' if own else ' '} zero={row['stage']:<5} {row['mode']:9}"
        text.append(f"{name}{figures} {rate:>11}  {row['longest']:,}, {row['batch']:,}")
    chosen = f"zero={found['zero']} activation_checkpointing={found['activation_checkpointing']}"
    fit = {(row["stage"], row["mode"]) for row in phase["memory"] if row["total"] <= found["memory_bytes"]}
    limit = f"{found['memory_bytes'] / GB:g} GB"
    if not fit:
        text.append(
            f"  warning: none of these fits into {limit}; give more gpus with zero=3, or a smaller micro_batch or seq_len"
        )
    elif (found["zero"], found["activation_checkpointing"]) not in fit:
        text.append(f"  warning: {chosen} does not fit into {limit}; choose another line of the table")
    speed = phase["speed"]
    if speed is None:
        return text
    share = "" if speed["mfu"] is None else f", MFU {speed['mfu']:.1%}"
    text.append(
        f"predicted for {chosen} on {found['gpus']} {found['gpu']}: {speed['tokens_per_second']:,.0f} tokens/s, "
        f"{speed['step_seconds']:.4g} s a step of {phase['global_batch'] * phase['seq_len']:,} tokens{share}; "
        f"{speed['seconds'] / DAY:.3g} days for {phase['tokens']:,} tokens"
    )
    text.append("  milliseconds: " + ", ".join(f"{part} {1e3 * s:.1f}" for part, s in speed["parts"].items()))
    return text


if __name__ == "__main__":
    raise SystemExit(main())
