"""Device times and memory of calls, measured side by side: rounds interleave the calls, events bracket each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over rounds and the extremes. `error` says why there is none."""

    median: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    error: str = ""

    def json(self) -> dict[str, object]:
        return {"error": self.error} if self.error else {"ms": self.median, "low": self.low, "high": self.high}


def _once(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def time_calls(calls: dict[str, Call], rounds: int, slice_ms: float = 60.0) -> dict[str, Timing]:
    """Times every call in `rounds` interleaved rounds, each round repeating a call for about slice_ms.

    A call that raises in its warm-up (a shape it does not serve, no memory) gets a Timing with that error.
    """
    repeats, failed = {}, {}
    for name, call in calls.items():
        try:
            _once(call, 1)  # compiles
            repeats[name] = max(1, min(50, int(slice_ms / max(_once(call, 2), 1e-3))))
        except Exception as error:  # rivals and compilers raise what they like; the table says which
            failed[name] = Timing(error=reason(error))
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name, times_of in times.items():
            times_of.append(_once(calls[name], repeats[name]))
    timed = {name: Timing(statistics.median(t), min(t), max(t)) for name, t in times.items()}
    return {name: timed.get(name) or failed[name] for name in calls}


def peak_bytes(call: Call) -> int:
    """Most memory allocated during a call beyond what was allocated before it, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best now: bf16 matrix products in FLOP/s, device-to-device copies in bytes/s."""

    flops: float
    bandwidth: float


def measure_ceilings(rounds: int = 5) -> Ceilings:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    timed = time_calls({"matmul": lambda: torch.mm(a, b, out=c), "copy": lambda: y.copy_(x)}, rounds)
    return Ceilings(2 * n**3 / timed["matmul"].median * 1e3, 2 * x.numel() * 4 / timed["copy"].median * 1e3)
