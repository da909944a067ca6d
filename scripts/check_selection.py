"""Whether a cache's prefill and steps choose the blocks that training's forward reads, on this machine's GPU.

    python scripts/check_selection.py [CHECKPOINT ... --text FILE] [--models NAME,...] [--dtypes bf16,fp32] [--out FILE]

Of each model, a trained one or a shipped config with random weights, texts go through the whole forward, then through a cache:
half of a prompt, the rest of it, and the text's end a token at a time. Told are how many choices (a token's in one layer for
one KV head) differ from the forward's, and of those by how much, as a share of all blocks' importance, a chosen block is
lighter than one passed over, in float64 and by the forward's queries and keys. The first three are given the forward's own
queries, keys and values, so that they compare the operator alone:

    run        several tokens at once: the second half of each text
    step       one token at a time: the decode kernels; with how many choices hung by rounding, so that they made them anew
    anew       the same where they make every choice anew
    prefill    the whole model, the prompts' second part through the cache
    steps      the whole model, the texts' end a token at a time
    compiled   the forward again, by compiled layers as training runs it: what the two before are to be judged by

Prints a table; on a machine without GPUs it runs at toy size, with what runs there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sieve.eval.load import Loaded
from sieve.kernels.nsa.api import nsa_attention
from sieve.kernels.nsa.decode import nsa_decode
from sieve.kernels.nsa.layout import Packing
from sieve.model.decoder import Decoder
from sieve.model.nsa import NSA
from sieve.model.step import Step
from sieve.scripts.bench.decode_check import weigh
from sieve.scripts.bench.decode_model import VOCABULARY, build
from sieve.scripts.bench.report import origin, write_json
from sieve.train.load import open_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHED = 512  # queries at a time whose blocks are weighed in float64
TOGETHER = 256  # queries of a text that are decoded at once as so many sequences


@dataclass(frozen=True)
class Text:
    """tokens int64 [T]. Of each NSA layer: q [T, H, Dqk] and k_cmp [C, Hkv, Dqk] of the whole forward, its choices int32
    [T, Hkv, topk], and whatever else the operator got."""

    tokens: Tensor
    inputs: list[tuple[tuple, dict]]
    chosen: list[Tensor]


@dataclass
class Tally:
    """Choices compared, those of them that were made anew, and of each that differs the importance by which it is lighter, as
    a share of all blocks'."""

    compared: int = 0
    near: int = 0
    lost: list[float] = field(default_factory=list)

    def add(self, ours: Tensor, text: Text, layer: int, first: int) -> None:
        """ours int32 [n, Hkv, topk]: of the text's tokens from `first` on."""
        (q, k_cmp, *_, geometry), options = text.inputs[layer]
        self.compared += ours[..., 0].numel()
        differs = (ours != text.chosen[layer][first : first + len(ours)]).any(-1)
        rows = differs.any(1).nonzero()[:, 0]
        for part in rows.split(WEIGHED) if len(rows) else ():
            heads = q[first + part].unflatten(1, (k_cmp.shape[1], -1)).permute(1, 2, 0, 3)[None]
            least, left, total = weigh(
                heads, k_cmp.transpose(0, 1)[None], (first + part)[None], ours[part].transpose(0, 1)[None], geometry,
                options["scale"],
            )
            self.lost += ((left - least).clamp(min=0) / total)[0].T[differs[part]].tolist()

    @property
    def told(self) -> dict[str, float]:
        found = torch.tensor(self.lost or [0.0], dtype=torch.float64)
        return {
            "choices": self.compared, "near": self.near, "different": len(self.lost), "lost_median": float(found.median()),
            "lost_most": float(found.max()),
        }


def nsa_layers(model: Decoder) -> list[NSA]:
    return [layer.attention for layer in model.layers if isinstance(layer.attention, NSA)]


@contextmanager
def watched(model: Decoder) -> Iterator[list[Tensor]]:
    """What the model's NSA layers choose meanwhile, one after the other."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: found.append(out[1]["indices"])) for layer in nsa_layers(model)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def alone(tokens: int, device: torch.device) -> Packing:
    return Packing.of(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, tokens)


@torch.no_grad()
def whole(model: Decoder, tokens: Tensor) -> Text:
    """The forward of one text that fills a row."""
    inputs: list[tuple[tuple, dict]] = []

    def operator(*args, **options):
        inputs.append((args, options))
        return nsa_attention(*args, **options)

    for layer in nsa_layers(model):
        layer.operator = operator
    try:
        with watched(model) as chosen:
            model.hidden(tokens[None], alone(len(tokens), tokens.device))
    finally:
        for layer in nsa_layers(model):
            layer.operator = None
    return Text(tokens, inputs, chosen)


@torch.no_grad()
def step_of(text: Text, layer: int, positions: Tensor, *, anew: bool = False) -> tuple[Tensor, int]:
    """int32 [n, Hkv, topk]: the choices of n steps at `positions`, given what the forward's operator got, and how many of them
    the decode kernels made anew: all that there are to make, if `anew`."""
    (q, k_cmp, v_cmp, k_slc, v_slc, _, _, gates, _, geometry), options = text.inputs[layer]
    n, spare = len(positions), -len(k_cmp) % 16 or 16
    caches = []
    for x, more in ((k_cmp, spare), (v_cmp, spare), (k_slc, 0), (v_slc, 0)):
        x = torch.cat([x, x.new_zeros(more, *x.shape[1:])]).transpose(0, 1).contiguous()
        caches.append(x.expand(n, *x.shape))
    # The choice reads no window.
    window = [x.new_zeros(1, 1, 1, 1).expand(n, x.shape[1], geometry.window_size, x.shape[2]) for x in (k_slc, v_slc)]
    query = positions.int()[:, None]
    args = (q[positions][:, None], *caches, *window, gates[positions][:, None], query)
    if q.device.type == "cuda":
        from sieve.kernels.nsa.decode_tiles import DecodeTiles  # needs the package triton, as the next
        from sieve.kernels.nsa.decode_triton import launches

        tiles = DecodeTiles.of(q.shape[1] // k_cmp.shape[1], q.shape[2], v_cmp.shape[2], q.dtype, q.device)
        tiles = replace(tiles, margin=math.inf) if anew else tiles
        found = launches(*args, geometry, scale=options["scale"], tiles=tiles)
        for call in found.calls.values():
            call()
        return found.index[:, 0], int(found.near.sum())
    place = torch.arange(geometry.window_size, dtype=torch.int32, device=q.device)
    held = (query - torch.remainder(query - place, geometry.window_size)).clamp(min=-1)
    _, indices = nsa_decode(*args, held, len(q), geometry, scale=options["scale"], impl="reference")
    return indices[:, 0], 0


@torch.no_grad()
def run_of(text: Text, layer: int, past: int) -> Tensor:
    """int32 [T - past, Hkv, topk]: the choices of all tokens from `past` on at once, given what the forward's operator got."""
    from sieve.kernels.nsa.chunk_triton import attend_run  # needs the package triton

    (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, _, geometry), options = text.inputs[layer]
    stored = [x.transpose(0, 1).contiguous() for x in (k_cmp, v_cmp, k_slc, v_slc)]
    windows = [x[max(0, past + 1 - geometry.window_size) :] for x in (k_win, v_win)]
    return attend_run(q[past:], *stored, *windows, gates[past:], past, geometry, scale=options["scale"])[1]


def random_texts(lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    rng = torch.Generator(device).manual_seed(0)
    return [torch.randint(0, VOCABULARY, (n,), generator=rng, device=device) for n in lengths]


@torch.no_grad()
def compare(model: Decoder, tokens: Sequence[Tensor], steps: int) -> dict[str, dict[str, float]]:
    """The comparisons. tokens: texts int64 [T], of each of which the last `steps` are decoded one at a time."""
    texts, layers = [whole(model, t) for t in tokens], range(len(nsa_layers(model)))
    device = tokens[0].device
    gpu = device.type == "cuda"
    names = ("run", "step", "anew", "prefill", "steps", "compiled") if gpu else ("step", "prefill", "steps")
    found = {name: Tally() for name in names}
    for text in texts:
        for layer in layers:
            for part in torch.arange(len(text.tokens), device=device).split(TOGETHER):
                for name in ("step", "anew") if gpu else ("step",):
                    ours, near = step_of(text, layer, part, anew=name == "anew")
                    found[name].add(ours, text, layer, int(part[0]))
                    found[name].near += near
            if gpu:
                past = len(text.tokens) // 2
                found["run"].add(run_of(text, layer, past), text, layer, past)
    _prefill_and_steps(model, texts, steps, found["prefill"], found["steps"])
    if gpu:
        model.compile_layers()
        for text in texts:
            for layer, ours in enumerate(chosen_compiled(model, text)):
                found["compiled"].add(ours, text, layer, 0)
    return {name: tally.told for name, tally in found.items()}


def _prefill_and_steps(model: Decoder, texts: list[Text], steps: int, prefill: Tally, last: Tally) -> None:
    layers, tokens = range(len(nsa_layers(model))), [text.tokens for text in texts]
    cache, done = model.new_cache(len(texts), max(map(len, tokens))), [0] * len(texts)
    for share in (2, 1):  # half of each prompt, which is the whole forward's still, then the rest
        upto = [(len(t) - steps) // share for t in tokens]
        new = [t[a:b] for t, a, b in zip(tokens, done, upto)]
        with watched(model) as chosen:
            model.extend(torch.cat(new), [len(t) for t in new], cache)
        for layer, ours in enumerate(chosen):
            for text, first, part in zip(texts, done, ours.split([len(t) for t in new])):
                if first:
                    prefill.add(part, text, layer, first)
        done = upto
    step = Step(model, cache, graph=False)
    with watched(model) as chosen:
        for back in range(steps, 0, -1):
            step(torch.stack([t[-back] for t in tokens]))
    for layer in layers:
        ours = torch.stack(chosen[layer :: len(layers)])  # [steps, B, Hkv, topk]
        for row, text in enumerate(texts):
            last.add(ours[:, row], text, layer, len(text.tokens) - steps)


@torch.no_grad()
def chosen_compiled(model: Decoder, text: Text) -> list[Tensor]:
    """Of each NSA layer of a model whose layers are compiled. A hook would be compiled with its layer, anew in every call."""
    found, run = [], model._compiled

    def recording(*args):
        x, report = run(*args)
        found.extend([report["indices"]] if "indices" in report else [])
        return x, report

    model._compiled = recording
    try:
        model(text.tokens[None], text.tokens[None], alone(len(text.tokens), text.tokens.device))
    finally:
        model._compiled = run
    return found


def _texts(path: Path, model: Loaded, lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Of the file, one after the other. ValueError where it is too short."""
    tokens = torch.tensor(model.text.prompt(path.read_text(encoding="utf-8")), device=device)
    if len(tokens) < sum(lengths):
        raise ValueError(f"--text {path} has {len(tokens)} tokens; --lengths asks for {sum(lengths)}")
    return list(tokens[: sum(lengths)].split(list(lengths)))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 for a mistake in the arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="check_selection.py", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", help="runs, checkpoints or exported folders")
    add("--text", type=Path, help="a file of text for the checkpoints to read")
    add("--models", default="small" if gpu else "tiny", help="shipped configs, with random weights and tokens; or none")
    add("--dtypes", default="bf16,fp16,fp32" if gpu else "fp32", help=f"of {', '.join(DTYPES)}")
    add("--lengths", default="8192,8001,6000,4097" if gpu else "1500,1301", help="tokens of each text")
    add("--steps", type=int, default=256 if gpu else 20, help="single tokens at the end of each text")
    add("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args(argv)
    lengths = [int(n) for n in options.lengths.split(",")]
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(DTYPES):
        parser.error(f"--dtypes {options.dtypes}: it takes {', '.join(DTYPES)}")
    if not 0 < options.steps < min(lengths) - 1:
        parser.error(f"--steps {options.steps} must be between 1 and the shortest of --lengths less 2, {min(lengths) - 2}")
    if options.checkpoints and options.text is None:
        parser.error("checkpoints need a text to read: --text FILE")
    run = origin(argv, "python scripts/check_selection.py") | {"found": []}
    device = torch.device("cuda" if gpu else "cpu")
    names = [] if options.models == "none" else options.models.split(",")
    head = f"{'model':20} {'dtype':5} {'compared':9} {'choices':>9} {'anew':>9} {'different':>9} {'share':>8}"
    print(f"{head}   lost: median, most")
    for name in [*options.checkpoints, *names]:
        for dtype in dtypes:
            if name in options.checkpoints:
                loaded = open_model(name, "runs", device, DTYPES[dtype]).loaded
                model, texts = loaded.decoder, _texts(options.text, loaded, lengths, device)
            else:
                model, texts = build(name, "nsa", str(device), DTYPES[dtype]), random_texts(lengths, device)
            for part, told in compare(model, texts, options.steps).items():
                run["found"].append({"model": name, "dtype": dtype, "compared": part} | told)
                share = told["different"] / max(told["choices"], 1)
                print(
                    f"{name:20.20} {dtype:5} {part:9} {told['choices']:9} {told['near']:9} {told['different']:9} {share:8.5f}"
                    f"   {told['lost_median']:.1e} {told['lost_most']:.1e}", flush=True,
                )
            if options.out:
                write_json(options.out, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
