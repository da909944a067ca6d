"""Where a step's time goes: a profile's events in categories that add up to the step."""

from __future__ import annotations

import bisect
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sieve.kernels.common.ranges import PREFIX

NSA = ("compression", "scores and top-n", "selection", "window", "gates")
DIRECTIONS = ("forward", "backward")
WAITS = ("data wait", "idle")
STEP, DATA, LOSS, OPTIMIZER = "step", "data", "loss", "optimizer"

# The first that matches names the category of a kernel that was launched outside of any range of ours.
_KERNELS = (
    ("communication", r"nccl"),
    ("full attention, backward", r"flash_bwd|fmha.*(bwd|backward)|sdpa.*bprop|flash_bprop"),
    ("full attention, forward", r"flash_fwd|fmha|sdpa.*fprop|flash_fprop"),
    ("experts", r"GroupProblemShape|[Gg]rouped_?[Gg]emm|GemmGrouped|grouped_mm|prepare_grouped"),
    ("matmul", r"nvjet|xmma_gemm|gemm|gemv|cublas|splitK|triton_tem_fused.*mm|cutlass.*Kernel2"),
    ("loss", r"liger|cross_entropy|element_mul_kernel"),
    ("optimizer", r"multi_tensor|[Ff]used_?[Aa]dam|lpnorm"),
    ("scores and top-n, forward", r"^_select$"),
    ("gates, forward", r"^_combine$"),
    ("gates, backward", r"^_combine_backward$"),
    ("selection, forward", r"^_(attend_lists|merge|unite)$"),
    ("selection, backward", r"^_(gather_rows|add_partials)$"),
    ("selection", r"^_(name_lists|measure|own)$"),
    ("compression, backward", r"^_prepare$"),
    ("window, backward", r"^_delta$"),
    ("attention of an unknown branch", r"^(runs_forward|runs_backward_q|_forward|_backward_q|_backward_kv)$"),
)
# The same for operators on a CPU.
_OPERATORS = (
    ("full attention", r"scaled_dot_product"),
    ("experts", r"grouped_mm"),
    ("matmul", r"aten::(mm|addmm|bmm|matmul|linear|baddbmm)"),
    ("optimizer", r"_fused_adam|_foreach|Optimizer"),
)
OTHER = "norm and elementwise"


def classify(kernel: str, ranges: Iterable[str] = ()) -> str:
    """The category of a GPU kernel of this name, launched within `ranges` (names as in a profile, innermost last)."""
    return _in_ranges(ranges) or _first(_KERNELS, kernel)


def classify_operator(name: str, ranges: Iterable[str] = ()) -> str:
    """The same for an operator's time on a CPU."""
    return _in_ranges(ranges) or _first(_OPERATORS, name)


def _first(patterns: tuple[tuple[str, str], ...], name: str) -> str:
    return next((category for category, pattern in patterns if re.search(pattern, name)), OTHER)


def _in_ranges(ranges: Iterable[str]) -> str | None:
    for name in reversed([r.removeprefix(PREFIX) for r in ranges if r.startswith(PREFIX)]):
        if name in (LOSS, OPTIMIZER) or name.split(",")[0] in NSA:
            return name
    return None


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step (mean over `steps`) by category, which add up to `step_seconds`; device: cuda or cpu.

    data wait: the device has nothing to do while the host waits for a batch. idle: it has nothing to do for any other
    reason, which on a GPU is that the host is late. kernels: (name, category, launches, seconds) of a step, by seconds.
    """

    device: str
    steps: int
    step_seconds: float
    parts: dict[str, float]
    kernels: list[tuple[str, str, float, float]]

    def json(self) -> dict[str, Any]:
        return {
            "device": self.device, "steps": self.steps, "step_seconds": self.step_seconds, "parts": self.parts,
            "kernels": [dict(zip(("name", "category", "launches", "seconds"), kernel)) for kernel in self.kernels],
        }

    def table(self) -> str:
        lines = [f"{'of a step':34}{'ms':>10}{'share':>8}"]
        for name, seconds in self.parts.items():
            lines.append(f"{name:34}{1e3 * seconds:10.3f}{seconds / self.step_seconds:8.1%}")
        total = sum(self.parts.values())
        return "\n".join([*lines, f"{'step':34}{1e3 * total:10.3f}{total / self.step_seconds:8.1%}"])


def breakdown(trace: Mapping[str, Any]) -> Breakdown:
    """Of a Chrome trace of torch.profiler that holds whole steps in ranges sieve::step. ValueError if it holds none.

    An instant in which several kernels, or nested operators, run belongs to the one that began last.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur", 0) >= 0]
    ranges = _Ranges(e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX))
    steps = ranges.spans(STEP)
    if not steps:
        raise ValueError(f"the profile holds no range {PREFIX}{STEP}; was a whole step recorded?")
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    first, last = min(s for s, _ in steps), max(e for _, e in steps)
    if kernels:
        launched = {
            e["args"]["correlation"]: (e["tid"], e["ts"])
            for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
        }
        # The host is ahead: its last step ends before the device has computed it.
        late = [e["ts"] + e["dur"] for e in kernels if _launch(e, launched)[1] < last]
        spans, last = list(_kernel_spans(kernels, launched, ranges)), max([last, *late])
    else:
        operators = [e for e in events if e.get("cat") == "cpu_op"]
        spans = [
            (e["ts"], e["ts"] + e["dur"], classify_operator(e["name"], ranges.around(e["tid"], e["ts"])), e["name"])
            for e in operators
        ]
    spans = [(max(s, first), min(e, last), *rest) for s, e, *rest in spans if e > first and s < last]
    seconds, gaps = _attribute(spans, first, last)
    seconds["data wait"] = sum(_overlap(gap, data) for gap in gaps for data in ranges.spans(DATA))
    seconds["idle"] = sum(end - start for start, end in gaps) - seconds["data wait"]
    scale = 1e-6 / len(steps)
    parts = {name: scale * seconds[name] for name in sorted(seconds, key=_place) if seconds[name] or name in WAITS}
    launches, own, category = Counter(), Counter(), {}
    for start, end, kind, name in spans:
        launches[name] += 1
        own[name] += end - start
        category[name] = kind
    found = [(name, category[name], launches[name] / len(steps), scale * us) for name, us in own.most_common(40)]
    return Breakdown("cuda" if kernels else "cpu", len(steps), scale * (last - first), parts, found)


def _place(category: str) -> tuple[int, str]:
    order = (*NSA, "attention", "full attention", "matmul", "experts", OTHER, LOSS, OPTIMIZER, "communication", *WAITS)
    return next((i for i, name in enumerate(order) if category.startswith(name)), len(order)), category[::-1]


class _Ranges:
    """The named stretches of the host's threads, to be asked what was around a moment."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self._by_thread: defaultdict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        self._by_name: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for e in events:
            self._by_thread[e["tid"]].append((e["ts"], e["ts"] + e["dur"], e["name"]))
            self._by_name[e["name"].removeprefix(PREFIX)].append((e["ts"], e["ts"] + e["dur"]))
        for found in self._by_thread.values():
            found.sort(key=lambda span: (span[0], -span[1]))

    def spans(self, name: str) -> list[tuple[float, float]]:
        return self._by_name[name]

    def around(self, thread: Any, moment: float) -> list[str]:
        """Names, outermost first. Ours nest a few deep and a step is one of them, so that a short look back is enough."""
        found = self._by_thread[thread]
        end = bisect.bisect_right(found, (moment, float("inf"), ""))
        near = found[max(end - 64, 0) : end]
        return [name for start, stop, name in near if start <= moment <= stop]


Launches = Mapping[Any, tuple[Any, float]]  # by the number that ties a kernel to its launch: thread and moment


def _launch(kernel: dict, launched: Launches) -> tuple[Any, float]:
    """Thread and moment of its launch; where the profile lost that, no thread and when it ran."""
    return launched.get(kernel.get("args", {}).get("correlation"), (None, kernel["ts"]))


def _kernel_spans(kernels: list[dict], launched: Launches, ranges: _Ranges) -> Iterable[tuple[float, float, str, str]]:
    """Of each kernel, its category by the range that it was launched in, which the launch's number leads to."""
    for e in kernels:
        yield e["ts"], e["ts"] + e["dur"], classify(e["name"], ranges.around(*_launch(e, launched))), e["name"]


def _attribute(
    spans: list[tuple[float, float, str, str]], first: float, last: float
) -> tuple[Counter[str], list[tuple[float, float]]]:
    """By category, how long one of its spans was the last to have begun; and when none was there."""
    seconds: Counter[str] = Counter()
    gaps: list[tuple[float, float]] = []
    running: list[tuple[float, float, float, str]] = []  # the last begun first
    now = first
    for start, end, category, _ in [*sorted(spans), (last, last, "", "")]:
        while now < start:
            while running and running[0][2] <= now:
                heapq.heappop(running)
            if not running:
                gaps.append((now, start))
                now = start
                break
            until = min(running[0][2], start)
            seconds[running[0][3]] += until - now
            now = until
        heapq.heappush(running, (-start, end - start, end, category))  # of two at once the shorter is inside
    return seconds, gaps


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
