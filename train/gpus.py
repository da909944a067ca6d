"""What GPUs reach: every figure that `sieve plan` predicts speeds from, each with its source. Nothing else holds one.

Sources under benchmarks/ are raw data of this repository; tests/train/test_gpus.py compares the figures with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_HOPPER = "benchmarks/2026-11-24-attention-hopper/group16/attention.json"
_OTHERS = "benchmarks/2026-11-24-attention-hopper/others/table.txt"
_VARLEN = "benchmarks/2026-11-24-attention-h200/group16/attention.json"
_STEPS = "benchmarks/2026-11-24-plan/small-8k.json"
_EXPERTS = "benchmarks/2026-11-24-plan/moe.txt"
_DECODE = "benchmarks/2026-11-24-decode/h100.json"


@dataclass(frozen=True)
class Figure:
    """value: in FLOP/s, bytes/s, bytes or a share, as the field it stands in says. source: where it was read."""

    value: float
    source: str


@dataclass(frozen=True)
class Measured:
    """Milliseconds that attention took, by part and direction, by tokens of a document: one document, in bf16.

    shape: query heads, KV heads, head_dim_qk, head_dim_v.
    """

    shape: tuple[int, int, int, int]
    ms: Mapping[str, Mapping[int, float]]
    source: str


# The first has every length and gives each part's course over the length; the others say by how much another shape differs.
# Random q and k in NSA: neighbouring queries share no selection, as at the start of a training; trained models are faster.
ATTENTION = (
    Measured((64, 4, 128, 128), {
        "cudnn, forward": {4096: 0.473, 8192: 1.828, 16384: 6.894, 32768: 27.648, 65536: 112.735},
        "cudnn, backward": {4096: 1.651, 8192: 5.981, 16384: 22.283, 32768: 83.822, 65536: 326.121},
        "compression, forward": {4096: 0.147, 8192: 0.233, 16384: 0.646, 32768: 2.152, 65536: 7.596},
        "compression, backward": {4096: 0.429, 8192: 0.702, 16384: 2.118, 32768: 7.078, 65536: 27.371},
        "scores and top-n, forward": {4096: 0.114, 8192: 0.173, 16384: 0.514, 32768: 1.696, 65536: 6.334},
        "selection, forward": {4096: 0.483, 8192: 1.258, 16384: 3.025, 32768: 6.439, 65536: 13.887},
        "selection, backward": {4096: 1.314, 8192: 2.788, 16384: 6.031, 32768: 12.69, 65536: 27.567},
        "window, forward": {4096: 0.214, 8192: 0.428, 16384: 0.842, 32768: 1.675, 65536: 3.383},
        "window, backward": {4096: 0.552, 8192: 1.136, 16384: 2.309, 32768: 4.677, 65536: 9.725},
        "gates, backward": {4096: 0.083, 8192: 0.161, 16384: 0.309, 32768: 0.603, 65536: 1.195},
    }, _HOPPER),
    Measured((64, 4, 128, 128), {
        "varlen, forward": {8192: 3.62, 16384: 14.126, 65536: 205.567},
        "varlen, backward": {8192: 10.84, 16384: 39.861, 65536: 547.445},
    }, _VARLEN),
    Measured((16, 4, 128, 128), {
        "cudnn, forward": {65536: 27.281}, "cudnn, backward": {65536: 79.746},
        "compression, forward": {65536: 1.872}, "compression, backward": {65536: 6.449},
        "scores and top-n, forward": {65536: 2.946},
        "selection, forward": {65536: 4.213}, "selection, backward": {65536: 8.352},
        "window, forward": {65536: 0.865}, "window, backward": {65536: 2.139}, "gates, backward": {65536: 0.308},
    }, _OTHERS),
    Measured((64, 4, 192, 128), {
        "cudnn, forward": {65536: 151.584}, "cudnn, backward": {65536: 457.037},
        "compression, forward": {65536: 9.833}, "compression, backward": {65536: 37.957},
        "scores and top-n, forward": {65536: 9.489},
        "selection, forward": {65536: 18.865}, "selection, backward": {65536: 41.358},
        "window, forward": {65536: 3.977}, "window, backward": {65536: 11.983}, "gates, backward": {65536: 1.191},
    }, _OTHERS),
    # Of whole steps: a 96th of the breakdown, which has 12 layers and 8 documents. Full attention's backward with the two
    # kernels of cuDNN that the breakdown counts as elementwise.
    Measured((12, 3, 64, 64), {
        "cudnn, forward": {8192: 0.252}, "cudnn, backward": {8192: 0.634},
        "compression, forward": {8192: 0.033}, "compression, backward": {8192: 0.0976},
        "scores and top-n, forward": {8192: 0.0498},
        "selection, forward": {8192: 0.1969}, "selection, backward": {8192: 0.4168},
        "window, forward": {8192: 0.0595}, "window, backward": {8192: 0.135}, "gates, backward": {8192: 0.0162},
    }, _STEPS),
)


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. matmul: FLOP/s of large bf16 products. bandwidth: bytes/s of a copy, read and written.
    fp32: FLOP/s of products in fp32, which the router has. grouped: FLOP/s of the experts' grouped products.
    elementwise: share of the bandwidth that norms, activations, RoPE and gradient copies reach.
    routing: share of the bandwidth that what lies between an MoE layer's products reaches, by model.moe.impl.
    nvlink, network: bytes/s a GPU sends, within a node and between nodes.
    """

    name: str
    memory: Figure
    matmul: Figure
    bandwidth: Figure
    fp32: Figure
    grouped: Figure
    elementwise: Figure
    routing: Mapping[str, Figure]
    nvlink: Figure
    network: Figure
    device: str  # of torch.cuda.get_device_name, a pattern


_ROUTING = {
    "torch": Figure(0.18, f"{_EXPERTS}, H200: 1.44 of the compiled layer's 2.517 ms are no product, for 1.09 GB"),
    "mixed": Figure(0.52, f"{_EXPERTS}, H200: sort, 2 copies, 2 sums, SwiGLU and its backward take 0.486 ms for 1.09 GB"),
    "triton": Figure(0.52, f"{_EXPERTS}, H200: as mixed"),
}
_ELEMENTWISE = Figure(
    0.71, f"{_STEPS}, H200, full: 14.4 ms of bytes at the full rate took 20.2 (22.6 less two kernels of cuDNN's backward)"
)
_FP32 = Figure(66.9e12, "specification, not measured: NVIDIA H100 architecture whitepaper v1.04, table 2 (SXM5)")
_NVLINK = Figure(450e9, "specification, not measured: NVLink 4, 900 GB/s both ways together (H100 and H200 datasheets)")
_NETWORK = Figure(50e9, "specification, not measured: one 400 Gbit/s adapter a GPU, as in DGX H100 and H200")

GPUS = {
    "h200": Gpu(
        "h200",
        memory=Figure(141e9, "NVIDIA H200 datasheet"),
        matmul=Figure(757.9e12, f"{_HOPPER}, ceilings"),
        bandwidth=Figure(4.235e12, f"{_HOPPER}, ceilings"),
        fp32=_FP32,
        grouped=Figure(474e12, f"{_EXPERTS}: torch's six products of hidden 1024 and 56 experts of 512, 76 % of plain ones"),
        elementwise=_ELEMENTWISE, routing=_ROUTING, nvlink=_NVLINK, network=_NETWORK, device=r"NVIDIA H200",
    ),
    "h100": Gpu(
        "h100",
        memory=Figure(80e9, "NVIDIA H100 datasheet (SXM)"),
        matmul=Figure(762.3e12, f"{_DECODE}, ceilings"),
        bandwidth=Figure(3.022e12, f"{_DECODE}, ceilings"),
        fp32=_FP32,
        grouped=Figure(474e12, f"the H200's, which has the same compute units: {_EXPERTS}"),
        elementwise=_ELEMENTWISE, routing=_ROUTING, nvlink=_NVLINK, network=_NETWORK, device=r"NVIDIA H100 80GB HBM3",
    ),
}


def gpu_of(device_name: str) -> str | None:
    """The key in GPUS of a GPU as torch.cuda.get_device_name names it; None where there are no figures for it."""
    return next((key for key, gpu in GPUS.items() if re.fullmatch(gpu.device, device_name)), None)
