"""`sieve bench moe`: the routed experts' products, passes and whole layer beside plain products, memory and a dense layer.

Checks every implementation against float64 first, and times none that fails. Then, in one process on one GPU: each
grouped product beside one plain product of the same FLOPs; each pass over memory beside the bytes it must move; forward
and backward of the whole layer, eager and compiled, beside the dense SwiGLU of equal active size. Tables come last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sieve.scripts.bench.arguments import at_least

EXAMPLES = """examples:
  sieve bench moe                                             the layer of model=moe-1b at 8k and 32k tokens
  sieve bench moe --hidden 1024 --size 256 --experts 64 --top-k 8 --tokens 16384
  sieve bench moe --device cpu --tokens 64 --hidden 32 --size 16 --experts 4 --top-k 2      that it runs, no more
Exit status: 1 where an implementation was wrong (it is not timed), 2 for a mistake or without a GPU.
"""
LIMITS = {"bfloat16": 1.5e-2, "float32": 1e-4}  # relative, in norm
CHECKED = 2048  # tokens of the comparison with float64


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sieve bench moe", description=__doc__.split("\n\n")[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", default="8192,32768", help="of a micro-batch, separated by commas (default %(default)s)")
    for name, default in (("hidden", 1024), ("size", 512), ("experts", 56), ("top-k", 6), ("shared", 1)):
        add(f"--{name}", type=int, default=default, help="(default %(default)s)")
    add("--rounds", type=at_least(1), default=5, help="(default %(default)s)")
    add("--impls", default="torch,mixed,triton", help="implementations, separated by commas (default %(default)s)")
    add("--bandwidth", type=float, default=4.2, help="TB/s of the memory floor (default %(default)s, an H200's)")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--no-compile", action="store_true", help="leave the compiled layers out")
    add("--out", type=Path, default=Path("benchmarks/moe"), help="folder of moe.json (default %(default)s)")
    options = parser.parse_args(argv)
    wrong = [t for t in options.tokens.split(",") if not t.isdigit() or int(t) < 1]
    if wrong:
        parser.error(f"--tokens: {', '.join(wrong)} is no positive number")
    options.impls = options.impls.split(",")
    unknown = [i for i in options.impls if i not in ("torch", "mixed", "triton")]
    if unknown:
        parser.error(f"--impls: {', '.join(unknown)} is none of torch, mixed, triton")
    if not 1 <= options.top_k <= options.experts:
        parser.error(f"--top-k {options.top_k} must lie between 1 and --experts {options.experts}")
    for name in ("hidden", "size"):
        if getattr(options, name) % 8 or getattr(options, name) < 8:
            parser.error(f"--{name} {getattr(options, name)} must be a positive multiple of 8")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _arguments(argv)
    import torch

    from sieve.scripts.bench import moe_parts, report
    from sieve.scripts.bench.moe_parts import Sizes

    if options.device == "cuda" and not torch.cuda.is_available():
        print("sieve bench moe: needs an NVIDIA GPU, or --device cpu", file=sys.stderr)
        return 2
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    limit = LIMITS[str(dtype).removeprefix("torch.")]

    def sizes(tokens: int) -> Sizes:
        o = options
        return Sizes(tokens, o.hidden, o.size, o.experts, o.top_k, o.shared, o.device, dtype)

    run: dict = report.origin(["moe", *argv]) | {"errors": {}, "limit": limit, "tokens": {}}
    lengths = [int(t) for t in options.tokens.split(",")]
    right = []
    for impl in options.impls:
        print(f"checking {impl}", flush=True)
        try:
            errors = moe_parts.check(sizes(min(CHECKED, max(lengths))), impl)
        except Exception as error:  # a compiler's too: it is not to be timed then
            run["errors"][impl] = moe_parts.reason(error)
        else:
            run["errors"][impl] = errors
            if all(e <= limit for e in errors.values()):  # NaN is wrong too
                right.append(impl)
    for tokens in lengths:
        print(f"timing {tokens} tokens", flush=True)
        run["tokens"][tokens] = measure(sizes(tokens), right, options)
        report.write_json(options.out / "moe.json", run)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    show(run, options)
    return 0 if right == options.impls else 1


def measure(sizes, impls: list[str], options: argparse.Namespace) -> dict:
    """Milliseconds of everything at one number of tokens, as the JSON has it."""
    from sieve.scripts.bench import moe_parts

    def timed(calls: dict) -> dict:
        return {name: t.json() for name, t in moe_parts.timed(calls, options.rounds, options.device).items()}

    def kept(calls: dict) -> dict:
        return {name: call for name, call in calls.items() if not name.startswith("triton") or "triton" in impls}

    found: dict = {"products": {}, "passes": {}, "layers": {}}
    for name, calls in moe_parts.products(sizes).items():
        found["products"][name] = timed(kept(calls))
    for name, (calls, size) in moe_parts.passes(sizes).items():
        found["passes"][name] = {"bytes": size, "calls": timed(calls)}
    found["layers"]["eager"] = timed(moe_parts.layers(sizes, impls, compiled=False))
    if options.device == "cuda" and not options.no_compile:
        found["layers"]["compiled"] = timed(moe_parts.layers(sizes, impls, compiled=True))
    return found


def _cell(timing: dict) -> str:
    return "none" if "error" in timing else f"{timing['ms']:.3f}"


def show(run: dict, options: argparse.Namespace) -> None:
    shape = f"hidden {options.hidden}, {options.experts} experts of {options.size}, top {options.top_k} + {options.shared}"
    print(f"\n{run['gpu']}, {shape}\nrelative errors against float64 (at most {run['limit']:g}):")
    for impl, errors in run["errors"].items():
        shown = errors if isinstance(errors, str) else "  ".join(f"{k} {v:.1e}" for k, v in errors.items())
        print(f"  {impl:8} {shown}")
    for tokens, found in run["tokens"].items():
        product = 2 * tokens * options.top_k * options.hidden * options.size
        print(f"\n{tokens} tokens: grouped products, ms (share of the plain product's rate)")
        for name, calls in found["products"].items():
            plain = calls["plain"]
            flops = product * (2 if "gate_up" in name or "d x" in name else 1)
            cells = [f"plain {_cell(plain)}" + (f" ({flops / plain['ms'] / 1e9:.0f} TFLOP/s)" if "ms" in plain else "")]
            for call, timing in calls.items():
                if call != "plain":
                    share = f" ({plain['ms'] / timing['ms']:.0%})" if "ms" in plain and "ms" in timing else ""
                    cells.append(f"{call} {_cell(timing)}{share}")
            print(f"  {name:26}" + "   ".join(cells))
        print(f"{tokens} tokens: passes, ms (share of the floor at {options.bandwidth:g} TB/s)")
        for name, entry in found["passes"].items():
            floor = entry["bytes"] / options.bandwidth / 1e9
            cells = [f"floor {floor:.3f}"]
            for call, timing in entry["calls"].items():
                cells.append(f"{call} {_cell(timing)}" + (f" ({floor / timing['ms']:.0%})" if "ms" in timing else ""))
            print(f"  {name:26}" + "   ".join(cells))
        for mode, calls in found["layers"].items():
            print(f"{tokens} tokens: whole layer, forward + backward, {mode}, ms (times the dense layer's)")
            dense = calls["dense"]
            for call, timing in calls.items():
                ratio = f" ({timing['ms'] / dense['ms']:.2f})" if "ms" in dense and "ms" in timing else ""
                print(f"  {call:26}{_cell(timing)}{ratio}")
        errors = [(n, t["error"]) for part in (*found["products"].values(), *found["layers"].values())
                  for n, t in part.items() if "error" in t]  # fmt: skip
        for name, error in errors:
            print(f"  {name}: {error}", file=sys.stderr)
    print(f"\nraw data: {options.out / 'moe.json'}")


if __name__ == "__main__":
    sys.exit(main())
