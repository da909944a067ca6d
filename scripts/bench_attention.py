"""`sieve bench attention`: the sparse operator and its branches beside full attention, on one GPU, in one process.

Checks every shape against the float64 reference first, and measures nothing that fails. `--sweep` times tile sizes
instead. Times are medians of interleaved rounds between device events; a floor is the matrix-product FLOPs at the rate
that a large bf16 product reaches in the same run.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sieve.scripts.bench.arguments import at_least

EXAMPLES = """examples:
  sieve bench attention --quick                                             8k and 64k, one shape
  sieve bench attention --shapes 64/4/192/128 --lengths 8192,65536 --inputs structured --rivals fa4,cudnn
  sieve bench attention --shapes 16/4/128/128 --lengths 65536 --only selection
  sieve bench attention --only window --sweep --lengths 65536               tile sizes
Results are written after each row, so that a run cut short keeps what it has. Exit status: 1 where a shape was wrong
(it is not timed), 2 without a GPU.
"""

SHAPES = "64/4/128/128,64/4/192/128,32/8/128/128,16/4/128/128,16/8/64/64"
LENGTHS = "4096,8192,16384,32768,65536,131072"
PARTS = ("operator", "compression", "scores", "selection", "window", "gates")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sieve bench attention", description=__doc__.split("\n\n")[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="?", default="attention", choices=["attention"])
    add("--shapes", default=SHAPES, help="heads/kv_heads/d_qk/d_v, separated by commas (default %(default)s)")
    add("--lengths", default=LENGTHS, help="tokens in a row, separated by commas (default %(default)s)")
    add("--inputs", default="random,structured", help="random, structured or both (default %(default)s)")
    add("--rivals", default="fa4,cudnn,fa2,fla", help="of fa4, cudnn, fa2, fla; or none (default %(default)s)")
    add("--only", choices=PARTS, help="one part of the operator, without rivals")
    add("--sweep", action="store_true", help="time the tile sizes of --only's kernels (all branches without it)")
    add("--launch", help="with --sweep, one launch of the branch: fwd, 'fwd + gates', dq, dkv")
    add("--rounds", type=at_least(1), default=5, help="interleaved rounds (default %(default)s)")
    add("--recompute", action="store_true", help="the operator also without keeping the branches' outputs")
    add("--quick", action="store_true", help="8k and 64k of the first shape, structured, three rounds")
    add("--out", type=Path, default=Path("benchmarks/attention"), help="folder of JSON and PNG (default %(default)s)")
    for size, default in (
        ("kernel-size", 32), ("kernel-stride", 16), ("block-size", 64), ("topk", 16), ("window-size", 512)
    ):  # fmt: skip
        add(f"--{size}", type=int, default=default, help="(default %(default)s)")
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.lengths = options.shapes.split(",")[0], "8192,65536"
        options.inputs, options.rounds = "structured", 3
    wrong = [text for text in options.shapes.split(",") if not re.fullmatch(r"[1-9]\d*(/[1-9]\d*){3}", text)]
    if wrong:
        parser.error(f"--shapes: {', '.join(wrong)} is not heads/kv_heads/d_qk/d_v, as in 64/4/128/128")
    wrong = [text for text in options.lengths.split(",") if not re.fullmatch(r"[1-9]\d*", text)]
    if wrong:
        parser.error(f"--lengths: {', '.join(wrong)} is not a positive number of tokens")
    options.kinds = options.inputs.split(",")
    known = {"inputs": {"random", "structured"}, "rivals": {"fa4", "cudnn", "fa2", "fla", "none"}}
    for name, allowed in known.items():
        unknown = set(getattr(options, name).split(",")) - allowed
        if unknown:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is not of {', '.join(sorted(allowed))}")
    return options


def _measure(case, kind: str, options: argparse.Namespace, forward: dict, backward: dict) -> list[str]:
    """Adds the calls of one input to those to be timed; returns the names of the whole operator's."""
    from sieve.scripts.bench.cases import branch_calls, operator_calls

    whole = []
    if options.only in (None, "operator"):
        for name, keep in (("ours", True), ("ours recompute", False))[: 1 + options.recompute]:
            forward[f"{name}, {kind}"], backward[f"{name}, {kind}"] = operator_calls(case, keep)
            whole.append(f"{name}, {kind}")
    if options.only != "operator":
        for calls, target in zip(branch_calls(case), (forward, backward)):
            for name, call in calls.items():
                if options.only in (None, *name.split(" + "), name.split()[0]):
                    target[f"{name}, {kind}"] = call
    return whole


def _row(
    shape, tokens: int, geometry, kinds: list[str], options: argparse.Namespace, ceilings
) -> dict[str, object]:
    """One shape and length: every call timed in the same rounds, printed, and returned for the JSON file."""
    import torch

    from sieve.scripts.bench.cases import draw, least_flops
    from sieve.scripts.bench.report import print_table
    from sieve.scripts.bench.rivals import TUNED, rival_calls
    from sieve.scripts.bench.timing import Timing, peak_bytes, reason, time_calls

    forward, backward, whole, missing = {}, {}, [], {}
    cases = {kind: draw(shape, tokens, geometry, kind == "structured") for kind in kinds}
    rivals = [] if options.only or options.rivals == "none" else options.rivals.split(",")
    for name in rivals:
        try:
            forward[name], backward[name] = rival_calls(next(iter(cases.values())), name)
            whole.append(name)
            if name in TUNED:
                print(f"{name} chooses its kernels' settings first, which may take minutes", flush=True)
        except ImportError as error:
            missing[name] = Timing(error=reason(error))
    for kind, case in cases.items():
        whole += _measure(case, kind, options, forward, backward)
    timed = [time_calls(calls, options.rounds) for calls in (forward, backward)]
    peaks = {}
    for name in whole:
        if not (timed[0][name].error or timed[1][name].error):
            peaks[name] = peak_bytes(forward[name]), peak_bytes(backward[name])
    flops = least_flops(shape, tokens, geometry)
    least = tuple({f"{part}, {kind}": n for part, n in side.items() for kind in kinds} for side in flops)
    for side, whole_flops in zip(least, flops):
        side |= {"operator": whole_flops["operator"], "dense": whole_flops["dense"]}
    # The fastest that did both, since FA4's backward refuses some shapes; else one that has a forward.
    dense = [r for r in ("fa4", "cudnn", "fa2") if r in timed[0] and not timed[0][r].error]
    rival = next((r for r in dense if not timed[1][r].error), dense[0] if dense else None)
    names = list(dict.fromkeys((*forward, *backward)))
    for side in timed:
        side |= missing
    print_table(f"{shape}, {tokens} tokens (rival: {rival})", names, *timed, least, rival, ceilings, peaks)
    del forward, backward
    torch.cuda.empty_cache()
    sides = ({name: timing.json() for name, timing in side.items()} for side in timed)
    return {
        "shape": str(shape), "tokens": tokens, "whole": whole, "rival": rival,
        **dict(zip(("forward", "backward"), sides)),
        "peak_bytes": peaks, "least_flops": dict(zip(("forward", "backward"), flops)),
    }  # fmt: skip


def _sweep(shapes, lengths: list[int], geometry, options: argparse.Namespace, run: dict) -> None:
    """Times tile sizes into run["rows"], written after each."""
    from sieve.scripts.bench.cases import draw
    from sieve.scripts.bench.report import write_json
    from sieve.scripts.bench.sweep import SWEPT, sweep

    for shape in shapes:
        for tokens in lengths:
            case = draw(shape, tokens, geometry, "structured" in options.kinds)
            for branch in [options.only] if options.only else SWEPT:
                found = sweep(case, branch, options.rounds, options.launch)
                run["rows"].append({"shape": str(shape), "tokens": tokens, "branch": branch, "tiles": {
                    name: [{"tile": vars(tile), **timing.json()} for tile, timing in timed]
                    for name, timed in found.items()
                }})  # fmt: skip
                write_json(options.out / "sweep.json", run)


def _checked(shapes, geometry, options: argparse.Namespace, run: dict) -> dict:
    """The kinds of inputs for which each shape is right; says of all what was found, and leaves it in run["checks"]."""
    from sieve.scripts.bench.check import check_shapes

    right = {}
    for shape, found in check_shapes(shapes, geometry, options.kinds).items():
        run["checks"][str(shape)] = found
        for kind, errors in found.items():
            if isinstance(errors, str):
                print(f"{shape}, {kind} is WRONG and is not timed: {errors}", file=sys.stderr, flush=True)
                continue
            largest = max(value for name, value in errors.items() if name != "same_selection")
            print(f"{shape}, {kind} is right: largest error {largest:.1e}", flush=True)
            right.setdefault(shape, []).append(kind)
    return right


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement; 0 when all went well, 1 where a shape's results are wrong, 2 without a GPU."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _arguments(argv)
    import torch

    if not torch.cuda.is_available():
        print("sieve bench attention: needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    from sieve.kernels.nsa.geometry import Geometry
    from sieve.scripts.bench.cases import Shape
    from sieve.scripts.bench.report import crossovers, origin, plot, print_crossovers, write_json
    from sieve.scripts.bench.timing import measure_ceilings

    geometry = Geometry(
        options.kernel_size, options.kernel_stride, options.block_size, options.topk, 1, 2, options.window_size
    )
    shapes = [Shape.parse(text) for text in options.shapes.split(",")]
    lengths = [int(text) for text in options.lengths.split(",")]
    run = origin(["attention", *argv]) | {"geometry": vars(geometry), "checks": {}, "rows": []}
    right = _checked(shapes, geometry, options, run)
    write_json(options.out / ("sweep.json" if options.sweep else "attention.json"), run)
    wrong = any(right.get(shape) != options.kinds for shape in shapes)
    torch.cuda.empty_cache()
    ceilings = measure_ceilings()
    run["ceilings"] = vars(ceilings)
    print(f"ceilings: {ceilings.flops / 1e12:.0f} TFLOP/s bf16, {ceilings.bandwidth / 1e12:.2f} TB/s", flush=True)
    if options.sweep:
        _sweep([shape for shape in shapes if shape in right], lengths, geometry, options, run)
        return int(wrong)
    for shape, kinds in right.items():
        for tokens in lengths:
            run["rows"].append(_row(shape, tokens, geometry, kinds, options, ceilings))
            run["crossovers"] = crossovers(run["rows"])
            write_json(options.out / "attention.json", run)  # after every row: a run cut short keeps what it has
    print_crossovers(run.get("crossovers", {}))
    if run["rows"]:
        plot(options.out / "attention.png", run["rows"], f"{run['gpu']}, {run['command']}, commit {run['commit'][:10]}")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
