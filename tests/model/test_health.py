import math

import pytest
import torch

from sieve.kernels.nsa.geometry import Geometry
from sieve.model.health import nsa_health

GEOMETRY = Geometry(kernel_size=2, kernel_stride=2, block_size=2, topk=3, init_blocks=1, local_blocks=1, window_size=4)


def test_by_hand(pack):
    # Documents of 5 and 2 tokens, one group; the second document starts at token 5.
    indices = torch.tensor([
        [0, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, -1], [0, 1, 2],
        [0, -1, -1], [0, -1, -1],
    ], dtype=torch.int32)[:, None]
    gates = torch.zeros(7, 2, 3)
    gates[:, 0] = torch.tensor([0.2, 0.4, 0.6])
    health = nsa_health(gates, indices, pack([5, 2]), GEOMETRY)
    assert {k: v.item() for k, v in health.items()} == pytest.approx({
        "gate_cmp": 0.1, "gate_slc": 0.2, "gate_win": 0.3,
        # by query: 0 | 1 | 2 + 0 | 3 + 1 | 4 + 2 + 0 | 0 | 1, over 11 chosen blocks
        "selected_distance": 14 / 11,
        # block 1 of the query at position 4 is neither first nor current
        "forced_share": 10 / 11,
        # 1 of 1 | 1 of 2 | 2 of 2 | 2 of 3 | 1 of 1; the first query of a document has no predecessor
        "selection_overlap": (1 + 1 / 2 + 1 + 2 / 3 + 1) / 5,
        # the second head's gates are exactly 0
        "saturated_cmp": 0.5, "saturated_slc": 0.5, "saturated_win": 0.5,
        # one free choice: block 1, which is the only one that ever was free
        "selection_entropy": 0.0, "never_selected": 0.0,
    })
    assert all(v.dtype == torch.float32 and v.dim() == 0 for v in health.values())


def test_documents_of_one_token(pack):
    indices = torch.tensor([0, -1, -1], dtype=torch.int32).expand(3, 2, 3)
    health = nsa_health(torch.full((3, 4, 3), 0.5), indices, pack([1, 1, 1]), GEOMETRY)
    assert health["selection_overlap"] == 0 and health["selected_distance"] == 0 and health["forced_share"] == 1


def test_free_choices(pack):
    """Documents of 16 and 3 tokens, blocks of 2, two groups: of the first's blocks 0..7, 1..6 can be chosen freely."""
    indices = torch.full((19, 2, 3), -1, dtype=torch.int32)
    position = torch.cat([torch.arange(16), torch.arange(3)])
    indices[:, :, 0] = 0
    indices[:, :, 1] = torch.where(position >= 2, position // 2, -1)[:, None]
    indices[10, 0, 2], indices[12, 0, 2] = 2, 4  # group 0: 3 and 2 blocks back
    indices[14, 1, 2], indices[15, 1, 2] = 4, 5  # group 1: 3 and 2 blocks back
    health = nsa_health(torch.full((19, 4, 3), 0.5), indices, pack([16, 3]), GEOMETRY)
    assert health["selection_entropy"].item() == pytest.approx(math.log(2) / math.log(6))
    assert health["never_selected"].item() == pytest.approx(8 / 12)
    assert health["saturated_win"] == 0
