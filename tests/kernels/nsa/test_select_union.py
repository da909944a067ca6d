"""The union of neighbouring queries' blocks: each block once, ascending, with a bit for each query that chose it."""

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa.select_union import unite_blocks  # noqa: E402


@pytest.mark.parametrize("tokens", [1, 3, 31, 64])
def test_union_names_each_block_once(tokens, device, dense, poison):
    block, kv_heads, topk = 8, 2, 3
    packing = dense.pack([7, 0, 1, 40, 22], device)
    T = packing.total_tokens
    indices = torch.randint(-1, 5, (T, kv_heads, topk), generator=torch.Generator().manual_seed(1)).int()
    indices = indices.sort(-1).values.to(device)  # repeats and blocks of the future among them
    union = unite_blocks(indices, packing, block, tokens, first_token=100)
    for h in range(kv_heads):
        for tile in range(union.tiles):
            want = {}
            for slot, t in enumerate(range(tile * tokens, min(tile * tokens + tokens, T))):
                position = int(packing.position[t])
                for j in indices[t, h].tolist():
                    if j >= 0 and j * block <= position:
                        start = 100 + t - position + j * block
                        want[start] = want.get(start, 0) | 1 << slot
            n = int(union.count[h, tile])
            bits = [m % 2**64 for m in union.members[h, tile, :n].tolist()]
            assert list(zip(union.start[h, tile, :n].tolist(), bits)) == sorted(want.items())


def test_too_many_tokens_for_a_mask(device, dense):
    with pytest.raises(ValueError, match="tokens=65"):
        unite_blocks(torch.zeros(3, 1, 1, dtype=torch.int32, device=device), dense.pack([3], device), 8, 65)
