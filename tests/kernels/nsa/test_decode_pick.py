"""The decode kernels' choice of blocks: exact, ties to the lower block, however many candidates and shares there are."""

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from sieve.kernels.nsa.decode_select import _pick  # noqa: E402
from sieve.kernels.nsa.decode_tiles import MOST_SHARE, heads_weighed, share_of, weigh_warps  # noqa: E402


@triton.jit
def picking(
    rank_ptr, block_ptr, rest_ptr, out_ptr, edge_ptr, current, COUNT: tl.constexpr, KEPT: tl.constexpr, SHARE: tl.constexpr,
    TOPK: tl.constexpr, WIDTH: tl.constexpr, MINE: tl.constexpr, THEIRS: tl.constexpr, SHARES_PADDED: tl.constexpr,
):  # fmt: skip
    picked, least, most = _pick(
        rank_ptr, block_ptr, rest_ptr, current, COUNT, KEPT, SHARE, TOPK, WIDTH, MINE, THEIRS, SHARES_PADDED
    )
    tl.store(out_ptr + tl.arange(0, WIDTH), picked)
    tl.store(edge_ptr, least)
    tl.store(edge_ptr + 1, most)


def heaviest(rank, n):
    """Ascending indices of the n largest, ties to the lower: of integers, so exactly."""
    return torch.sort(rank, descending=True, stable=True).indices[:n].sort().values


@pytest.mark.parametrize("values", [3, 1 << 30], ids=["ties", "distinct"])
@pytest.mark.parametrize("shares, share, topk, mine, theirs", [
    (1, 32, 16, 16, 16), (7, 64, 16, 128, 128), (9, 16, 5, 16, 32), (20, 128, 13, 64, 32), (3, 32, 64, 32, 16),
])  # fmt: skip
def test_the_heaviest_of_all_are_picked_from_the_heaviest_of_every_share(shares, share, topk, mine, theirs, values, device):
    width = 1 << (topk - 1).bit_length()
    kept = min(width, share)
    for seed, current in enumerate((shares * share - 1, shares * share - share // 2, topk, topk - 1, 2, 0)):
        rank = torch.randint(0, values, (shares * share,), generator=torch.Generator().manual_seed(seed)).int()
        rank[0], rank[current + 1 :] = 0x7FFFFFFF, -1  # a forced block, and the future
        own = rank.unflatten(0, (shares, share))
        block = torch.stack([heaviest(r, kept) + i * share for i, r in enumerate(own)]).int()  # [shares, kept]
        left = rank[block.long()]
        dropped = own.scatter(1, (block % share).long(), -1).amax(1)
        dropped[torch.arange(shares) * share > current] = 1 << 30
        left[torch.arange(shares) * share > current] = 1 << 30  # nothing wrote there
        out = torch.empty(width, dtype=torch.int32, device=device)
        edge = torch.empty(2, dtype=torch.int32, device=device)
        picking[(1,)](
            left.to(device), block.to(device), dropped.to(device), out, edge, current, COUNT=shares * kept, KEPT=kept,
            SHARE=share, TOPK=topk, WIDTH=width, MINE=mine, THEIRS=theirs, SHARES_PADDED=triton.next_power_of_2(shares),
        )  # fmt: skip
        want = torch.full((width,), -1, dtype=torch.int32)
        count = min(topk, current + 1)
        want[:count] = heaviest(rank[: current + 1], topk).int()
        assert torch.equal(out.cpu(), want), (seed, current)
        if current >= topk:  # the lightest chosen, and the heaviest of all others, those that no share keeps among them
            others = rank.scatter(0, want[:count].long(), -1)[: current + 1]
            assert edge.tolist() == [rank[want[:count].long()].min().item(), others.max().item()], (seed, current)


def test_shares_keep_both_comparisons_small():
    for blocks in (1, 20, 128, 1024, 2048, 16384):
        share = share_of(blocks, 16)
        assert 16 <= share <= MOST_SHARE and share & (share - 1) == 0
        left = -(-blocks // share) * 16
        assert left <= max(4 * share, 1024), (blocks, share)
    assert share_of(1024, 16) == 128 and heads_weighed(16, 128, 4) == 16  # 64k tokens: one step, 128 left of 8 shares
    assert heads_weighed(64, 256, 4) * 256 * 4 <= weigh_warps(256) * 1024 and heads_weighed(3, 16, 4) == 4
