"""`sieve bench decode`: one new token over a cache, NSA beside full attention, on one GPU, in one process.

Checks every shape against float64 first and times nothing that is wrong. A layer's step is timed from a CUDA graph of
several caches in turn, so that none is still in the L2 cache from the step before, and launched anew; then whole models,
prompts at once and by chunks, and steps.
Times are medians of interleaved rounds; a floor is the bytes of the keys and values read at the rate of a copy in this run.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sieve.scripts.bench.arguments import at_least

EXAMPLES = """examples:
  sieve bench decode --quick                                         64k, batch 8, one shape, no model
  sieve bench decode --quick --sweep                                 how the launches are cut, and with or without overlap
  sieve bench decode --shapes 64/4/192/128 --lengths 65536 --batches 1,8
  sieve bench decode --cpu                                           the code paths at toy sizes, no figures worth keeping
Results are written after each row. Exit status: 1 where a shape was wrong (it is not timed), 2 without a GPU.
"""


def _arguments(argv: list[str]) -> argparse.Namespace:
    from sieve.scripts.bench.decode_cases import RIVALS

    parser = argparse.ArgumentParser(
        prog="sieve bench decode", description=__doc__.split("\n\n")[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", default="64/4/128/128,12/3/64/64", help="heads/kv_heads/d_qk/d_v, by commas (default %(default)s)")
    add("--lengths", default="8192,32768,65536,131072", help="tokens a sequence has (default %(default)s)")
    add("--batches", default="1,8,32", help="sequences (default %(default)s)")
    add("--rivals", default=",".join(RIVALS), help="of these, or none (default %(default)s)")
    add("--models", default="small", help="shipped model configs, separated by commas, or none (default %(default)s)")
    add("--steps", type=at_least(1), default=64, help="of a whole model's decoding (default %(default)s)")
    add("--rounds", type=at_least(1), default=5, help="interleaved rounds (default %(default)s)")
    add("--sweep", action="store_true", help="time how the launches may be cut instead, without rivals and models")
    add("--quick", action="store_true", help="64k, batch 8, the first shape, three rounds, no model")
    add("--cpu", action="store_true", help="run everything on the CPU at toy sizes, to see that it works")
    add("--out", type=Path, default=Path("benchmarks/decode"), help="folder of decode.json (default %(default)s)")
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.lengths, options.batches = options.shapes.split(",")[0], "65536", "8"
        options.models, options.rounds = "none", 3
    if options.cpu:
        options.shapes, options.lengths, options.batches, options.models = "4/2/32/32", "300", "2", "tiny"
        options.steps = 3
    wrong = [text for text in options.shapes.split(",") if not re.fullmatch(r"[1-9]\d*(/[1-9]\d*){3}", text)]
    if wrong:
        parser.error(f"--shapes: {', '.join(wrong)} is not heads/kv_heads/d_qk/d_v, as in 64/4/128/128")
    for name in ("lengths", "batches"):
        wrong = [text for text in getattr(options, name).split(",") if not re.fullmatch(r"[1-9]\d*", text)]
        if wrong:
            parser.error(f"--{name}: {', '.join(wrong)} is not a positive number")
        setattr(options, name, [int(text) for text in getattr(options, name).split(",")])
    options.rivals = [] if options.rivals == "none" else options.rivals.split(",")
    wrong = sorted(set(options.rivals) - set(RIVALS))
    if wrong:
        parser.error(f"--rivals: {', '.join(wrong)} is not of {', '.join(RIVALS)}")
    options.models = [] if options.models == "none" else options.models.split(",")
    return options


def _geometry(toy: bool):
    from sieve.kernels.nsa.geometry import Geometry

    return Geometry(8, 4, 16, 4, 1, 2, 24) if toy else Geometry(32, 16, 64, 16, 1, 2, 512)


def _checked(shapes, geometry, options: argparse.Namespace, run: dict) -> list:
    """The shapes that are right; says of all what was found, and leaves it in run["checks"]."""
    import torch

    from sieve.scripts.bench.decode_check import check
    from sieve.scripts.bench.timing import reason

    place = {"device": "cpu", "impl": "reference", "dtype": torch.float32, "tokens": 300} if options.cpu else {}
    right = []
    for shape in shapes:
        try:
            run["checks"][str(shape)] = found = check(shape, geometry, **place)
        except Exception as error:  # a compiler's too: whatever it is, this shape is not to be timed
            run["checks"][str(shape)] = reason(error)
            print(f"{shape} is WRONG and is not timed: {reason(error)}", file=sys.stderr, flush=True)
            continue
        right.append(shape)
        print(f"{shape} is right: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    return right


def _models(options: argparse.Namespace, run: dict, save) -> None:
    import torch

    from sieve.scripts.bench.decode_model import build, measure, prefill
    from sieve.scripts.bench.timing import reason

    device, dtype = ("cpu", torch.float32) if options.cpu else ("cuda", torch.bfloat16)
    for name in options.models:
        for attention in ("nsa", "full"):
            decoder = build(name, attention, device, dtype)
            for tokens in options.lengths:
                rates = prefill(decoder, tokens)
                run["prefill"].append({"model": name, "attention": attention, "tokens": tokens, "tokens_per_second": rates})
                said = ", ".join(f"{how} {rate:.0f}" for how, rate in rates.items())
                print(f"{name} {attention} prompt of {tokens} tokens: {said} tokens/s", flush=True)
                for batch in options.batches:
                    case = {"model": name, "attention": attention, "tokens": tokens, "batch": batch}
                    try:
                        found = measure(decoder, tokens, batch, options.steps)
                    except torch.cuda.OutOfMemoryError as error:
                        case["skipped"] = reason(error)
                        print(f"{name} {attention} {tokens} tokens, batch {batch}: skipped, no memory", flush=True)
                    else:
                        case |= vars(found)
                        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in found.tokens_per_second.items())
                        print(f"{name} {attention} {tokens} tokens, batch {batch}: {rates} tokens/s", flush=True)
                    run["models"].append(case)
                    save()
                    if not options.cpu:
                        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement; 0 when all went well, 1 where a shape's results are wrong, 2 without a GPU."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _arguments(argv)
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print("sieve bench decode: needs an NVIDIA GPU, and torch sees none; --cpu runs the code at toy sizes", file=sys.stderr)
        return 2
    from sieve.scripts.bench.cases import Shape
    from sieve.scripts.bench.decode_report import print_layers, print_models
    from sieve.scripts.bench.report import origin, write_json

    geometry = _geometry(options.cpu)
    shapes = [Shape.parse(text) for text in options.shapes.split(",")]
    run = origin(["decode", *argv]) | {"geometry": vars(geometry), "checks": {}, "layers": [], "models": [], "prefill": []}

    def save() -> None:
        write_json(options.out / "decode.json", run)

    right = _checked(shapes, geometry, options, run)
    save()
    if not options.cpu:
        from sieve.scripts.bench.decode_timing import time_layer
        from sieve.scripts.bench.timing import measure_ceilings

        run["ceilings"] = vars(measure_ceilings())
        torch.cuda.empty_cache()
        print(f"a copy moves {run['ceilings']['bandwidth'] / 1e12:.2f} TB/s", flush=True)
        for shape in right:
            for tokens in options.lengths:
                for batch in options.batches:
                    case = (shape, geometry, tokens, batch)
                    if options.sweep:
                        from sieve.scripts.bench.decode_sweep import print_sweep, sweep

                        run["layers"].append(sweep(*case, options.rounds))
                        print_sweep(run["layers"][-1:])
                    else:
                        run["layers"].append(time_layer(*case, options.rivals, options.rounds))
                    save()
                    torch.cuda.empty_cache()
    if not options.sweep:
        _models(options, run, save)
    print_layers(run)
    print_models(run)
    return int(len(right) < len(shapes))


if __name__ == "__main__":
    raise SystemExit(main())
