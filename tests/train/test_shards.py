"""Pieces that one number of ranks wrote are read by another, cut at any place."""

from __future__ import annotations

import random

import pytest
import torch

from sieve.train.hostcopy import HostCopy
from sieve.train.partition import Piece
from sieve.train.shards import ShardReader, share


def pieces_of(values: dict[str, torch.Tensor], cuts: dict[str, list[int]], rank: int) -> list[Piece]:
    found = []
    for name, value in values.items():
        edges = [0, *cuts[name], len(value)]
        start, stop = edges[rank], edges[rank + 1]
        if start < stop:
            found.append(Piece(name, start, stop, {"weight": value[start:stop], "m": -value[start:stop]}, torch.tensor(7.0)))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_is_read_by_any_other(seed, tmp_path):
    generator = random.Random(seed)
    values = {f"p{i}": torch.randn(generator.randrange(1, 50)) for i in range(6)}

    def cuts(count: int) -> dict[str, list[int]]:
        return {name: sorted(generator.choices(range(len(v) + 1), k=count - 1)) for name, v in values.items()}

    writers, readers = generator.choice([1, 2, 4]), generator.choice([1, 2, 4])
    at = cuts(writers)
    for rank in range(writers):
        copy = HostCopy()
        copy.take(pieces_of(values, at, rank), {"bias": torch.arange(4.0)} if rank == 0 else {})
        copy.write(tmp_path / f"rank-{rank:05d}.safetensors")
    reader, at = ShardReader(tmp_path), cuts(readers)
    blank = {name: torch.full_like(v, torch.nan) for name, v in values.items()}
    for rank in range(readers):
        wanted = [
            Piece(p.name, p.start, p.stop, {kind: torch.full_like(t, torch.nan) for kind, t in p.tensors.items()},
                  torch.tensor(0.0)) for p in pieces_of(values, at, rank)
        ]
        bias = torch.zeros(4)
        reader.fill(wanted, {"bias": bias})
        assert torch.equal(bias, torch.arange(4.0))
        for piece in wanted:
            assert piece.step == 7 and torch.equal(piece.tensors["m"], -piece.tensors["weight"])
            blank[piece.name][piece.start : piece.stop] = piece.tensors["weight"]
    assert all(torch.equal(blank[name], values[name]) for name in values)


def test_what_is_missing_is_named(tmp_path):
    copy = HostCopy()
    copy.take([Piece("p", 0, 4, {"weight": torch.zeros(4)}, torch.tensor(1.0))], {})
    copy.write(tmp_path / "rank-00000.safetensors")
    with pytest.raises(ValueError, match="has no weight of p from element 4 to 6"):
        ShardReader(tmp_path).read("weight", "p", 2, 6)
    with pytest.raises(ValueError, match="has no buffer b"):
        ShardReader(tmp_path).buffer("b")


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_cover_everything_once(world):
    pieces = [Piece("p", 0, 5, {"weight": torch.arange(5.0)}, torch.tensor(1.0))]
    parts = [piece for rank in range(world) for piece in share(pieces, rank, world)]
    assert torch.equal(torch.cat([p.tensors["weight"] for p in parts]), torch.arange(5.0))
