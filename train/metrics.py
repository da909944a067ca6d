"""What the metrics mean: model FLOPs utilisation, memory, and how evenly the router loads its experts."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Mapping

import torch
from torch import Tensor

# Names as torch.cuda.get_device_name gives them. A name that is not here has no peak, hence no MFU: a guess misleads.
_PEAK_BF16_DENSE = (
    (r"NVIDIA H200", 989.4e12),
    (r"NVIDIA H200 NVL", 835.5e12),
    (r"NVIDIA GH200 \d+GB", 989.4e12),
    (r"NVIDIA H[18]00 \d+GB HBM3", 989.4e12),
    (r"NVIDIA H100 NVL", 835.5e12),
    (r"NVIDIA H[18]00 PCIe", 756.5e12),
    (r"(NVIDIA )?A[18]00-(SXM4|PCIE)-\d+GB|NVIDIA A[18]00 \d+GB PCIe", 312.0e12),
    (r"NVIDIA B200", 2250.0e12),
    (r"NVIDIA L40S", 362.05e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 matmul peak of one GPU in FLOP/s (fp32 accumulation, no sparsity), or None for an unknown one.

    Sources, all NVIDIA's, halved where only the sparse rate is printed: H100 Tensor Core GPU Architecture whitepaper
    v1.04 table 2 (SXM5 989.4, PCIe 756), H100 NVL and H200 NVL product briefs (835.5), H200 and GH200 datasheets
    (989), A100 whitepaper v1.0 table 1 (312), HGX B200 datasheet (2,250 a GPU), L40S datasheet (362.05); the H800 and
    A800 keep the tensor-core rate of the H100 and A100. A MIG slice has a part of its GPU's peak, so it has none here.
    """
    for pattern, peak in _PEAK_BF16_DENSE:
        if re.fullmatch(pattern, device_name):
            return peak
    return None


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_flops` of a torch device; None on the CPU, whose peak depends on clocks nobody can ask for."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(flops_per_token: float, tokens_per_second: float, peak: float, world_size: int) -> float:
    """Share of `world_size` GPUs' peak that the model's own training FLOPs use (arXiv 2204.02311, appendix B).

    flops_per_token: forward and backward, without recomputation. tokens_per_second: over all ranks.
    """
    return flops_per_token * tokens_per_second / (peak * world_size)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: what torch allocated on a GPU; on the CPU the process's resident set, libraries too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def moe_metrics(
    expert_load: Mapping[int, Tensor], step_load: Mapping[int, Tensor], router_bias: Mapping[int, Tensor]
) -> dict[str, float]:
    """`moe/layer_NN/...` from the tokens routed to each expert ([E] a layer), in all steps since the last record and in the
    last one, and the balancing bias ([E] a layer).

    load_max: the busiest expert's share over the mean share (1 is even), of all those steps together: one global batch may have
    few documents. load_max_step: of the last one alone. load_cv: standard deviation over mean (0 is even). entropy: of the
    experts' shares, over its largest value log E (1 is even, 0 one expert for all). bias_norm: L2 norm of the bias. A layer
    that routed nothing gives no load. The loads are sums over the micro-batches and ranks of a global batch, so that none of
    these depends on how it is spread.
    """
    metrics: dict[str, float] = {}
    for layer, load in step_load.items():
        if (total := load.double().mean().item()) > 0:
            metrics[f"moe/layer_{layer:02d}/load_max_step"] = load.max().item() / total
    for layer, load in expert_load.items():
        load = load.detach().double()
        mean = load.mean().item()
        if mean > 0:
            metrics[f"moe/layer_{layer:02d}/load_max"] = load.max().item() / mean
            metrics[f"moe/layer_{layer:02d}/load_cv"] = load.std(correction=0).item() / mean
            share = load / load.sum()
            entropy = -torch.special.xlogy(share, share).sum().item()
            metrics[f"moe/layer_{layer:02d}/entropy"] = entropy / math.log(len(load)) if len(load) > 1 else 1.0
    for layer, bias in router_bias.items():
        metrics[f"moe/layer_{layer:02d}/bias_norm"] = bias.detach().double().norm().item()
    return metrics
