"""The lists of queries by block: complete, ascending, cut into pieces that cover them."""

import pytest
import torch

pytest.importorskip("triton")

from sieve.kernels.nsa import inverse_index  # noqa: E402
from sieve.kernels.nsa.inverse_index import invert  # noqa: E402


@pytest.mark.parametrize("lengths", [[50], [7, 0, 1, 30, 16, 0], [1]], ids=str)
@pytest.mark.parametrize("segment, length", [(1000, 4), (1000, 64), (20, 3)])
@pytest.mark.parametrize("narrow", [inverse_index.NARROW, 0], ids=["int16", "int32"])
def test_lists_hold_exactly_the_queries_of_each_block(
    lengths, segment, length, narrow, device, dense, poison, monkeypatch
):
    monkeypatch.setattr(inverse_index, "NARROW", narrow)
    block, kv_heads, topk = 8, 2, 3
    packing = dense.pack(lengths, device)
    T, cu = sum(lengths), packing.cu_seqlens.tolist()
    indices = torch.randint(-1, 7, (T, kv_heads, topk), generator=torch.Generator().manual_seed(0)).int()
    indices = indices.sort(-1, descending=False).values.to(device)  # repeats and blocks of the future among them
    least = int(segment >= T)
    index = invert(indices, packing, block, segment, length, least=least)

    want = {}
    for t in range(T):
        for h in range(kv_heads):
            for j in set(indices[t, h].tolist()):
                position = int(packing.position[t])
                if j >= 0 and j * block <= position:
                    want.setdefault((t // segment, h, t - position + j * block), []).append(t)
    assert index.segments == -(-T // segment)
    starts = {}
    for s in range(index.segments):
        pieces, several = index.pieces[:, s].tolist()
        for number in range(index.lists):
            h, block_id = divmod(number, index.blocks)
            i = s * index.lists + number
            first, last = index.offset[i : i + 2].tolist()
            start, end = int(index.start[block_id]), int(index.end[block_id])
            if start < end:
                starts[h, start] = end
                assert index.token[first:last].tolist() == want.pop((s, h, start), [])
                assert index.list[first:last].tolist() == [i] * (last - first)
                for entry, t in zip(index.entry[first:last].tolist(), index.token[first:last].tolist()):
                    assert entry // topk == t * kv_heads + h
                    assert t - int(packing.position[t]) + int(indices.flatten()[entry]) * block == start
            else:
                assert first == last
            count = max(-(-(last - first) // length), least)
            before, before_several = (x[number - 1] if number else 0 for x in (pieces, several))
            assert pieces[number] - before == count
            assert several[number] - before_several == (count if count > 1 else 0)
            assert index.owner[s, before : before + count].tolist() == [number] * count
        assert (index.owner[s, pieces[-1] :] == index.lists).all()
        assert several[-1] <= index.rows
    assert not want
    keys = sorted(key for h, start in starts for key in range(start, starts[h, start]) if h == 0)
    assert keys == list(range(T)), "every key lies in one block"
    assert len(starts) == kv_heads * sum(-(-(b - a) // block) for a, b in zip(cu, cu[1:]))
