"""The lists of queries by block: complete, ascending, cut into pieces that cover them."""

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa.inverse_index import invert  # noqa: E402


@pytest.mark.parametrize("lengths", [[50], [7, 0, 1, 30, 16, 0], [1]], ids=str)
@pytest.mark.parametrize("length", [4, 64])
def test_lists_hold_exactly_the_queries_of_each_block(lengths, length, device, dense, poison):
    block, kv_heads, topk = 8, 2, 3
    packing = dense.pack(lengths, device)
    T, cu = sum(lengths), packing.cu_seqlens.tolist()
    indices = torch.randint(-1, 7, (T, kv_heads, topk), generator=torch.Generator().manual_seed(0)).int()
    indices = indices.sort(-1, descending=False).values.to(device)  # repeats and blocks of the future among them
    index = invert(indices, packing, block, length)

    want = {}
    for t in range(T):
        for h in range(kv_heads):
            for j in set(indices[t, h].tolist()):
                position = int(packing.position[t])
                if j >= 0 and j * block <= position:
                    want.setdefault((h, t - position + j * block), []).append(t)
    starts = {}
    for number in range(index.lists):
        h, block_id = divmod(number, index.blocks)
        first, last = index.offset[number : number + 2].tolist()
        start, end = int(index.start[block_id]), int(index.end[block_id])
        if start < end:
            starts[h, start] = end
            assert index.token[first:last].tolist() == want.pop((h, start), [])
        else:
            assert first == last
        count = max(-(-(last - first) // length), 1)
        before = int(index.pieces[0, number - 1]) if number else 0
        assert int(index.pieces[0, number]) - before == count
        assert index.owner[before : before + count].tolist() == [number] * count
    assert not want
    assert (index.owner[int(index.pieces[0, -1]) :] == index.lists).all()
    assert int(index.pieces[1, -1]) <= index.rows
    keys = sorted(key for h, start in starts for key in range(start, starts[h, start]) if h == 0)
    assert keys == list(range(T)), "every key lies in one block"
    assert len(starts) == kv_heads * sum(-(-(b - a) // block) for a, b in zip(cu, cu[1:]))
