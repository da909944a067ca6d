import math

import pytest
import torch

from sieve.train.metrics import device_peak_flops, mfu, moe_metrics, peak_flops, peak_memory_bytes


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756.5e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA B200", 2250e12),
])
def test_known_gpus(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "Tesla V100-SXM2-16GB", "NVIDIA H20", "",
])
def test_unknown_gpus_and_slices_have_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_the_cpu_has_no_peak() -> None:
    assert device_peak_flops(torch.device("cpu")) is None


def test_mfu_is_the_share_of_all_gpus() -> None:
    assert mfu(6e9, 1000.0, 1e13, 2) == pytest.approx(0.3)


def test_cpu_memory_is_the_resident_set_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert before > 50 * 2**20  # torch alone is more
    held = torch.ones(2**24)  # 64 MiB, written
    assert peak_memory_bytes(torch.device("cpu")) >= held.nbytes


def test_moe_metrics_of_a_hand_computed_load() -> None:
    since, last, bias = [2.0, 4.0, 6.0, 4.0], [0.0, 4.0, 0.0, 4.0], [3.0, -4.0, 0.0, 0.0]
    found = moe_metrics(*({3: torch.tensor(x)} for x in (since, last, bias)))
    assert found == {
        "moe/layer_03/load_max_step": pytest.approx(2.0),
        "moe/layer_03/load_max": pytest.approx(1.5),
        "moe/layer_03/load_cv": pytest.approx(math.sqrt(2.0) / 4),
        # Shares of 1, 2, 3 and 2 eighths.
        "moe/layer_03/entropy": pytest.approx((math.log(8) / 8 + math.log(4) / 2 + 3 / 8 * math.log(8 / 3)) / math.log(4)),
        "moe/layer_03/bias_norm": pytest.approx(5.0),
    }


def test_a_layer_without_tokens_gives_no_load() -> None:
    assert moe_metrics({1: torch.zeros(4)}, {1: torch.zeros(4)}, {}) == {}


def test_the_entropy_is_1_when_even_and_0_for_one_expert() -> None:
    loads = {0: torch.full((6,), 3.0), 1: torch.tensor([0.0, 9.0, 0.0]), 2: torch.tensor([5.0])}
    found = moe_metrics(loads, {}, {})
    assert [found[f"moe/layer_0{i}/entropy"] for i in range(3)] == [pytest.approx(1), pytest.approx(0), 1]
