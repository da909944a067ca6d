"""A checkpoint's tensors: `rank-NNNNN.safetensors` with what each rank held, and how any rank reads what it needs.

A tensor of a file is named KIND:PARAMETER:START and holds elements START and following of the flattened parameter:
KIND is `weight` (fp32 master), or the optimizer's name for a part of its state; `buffer` is a whole buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sieve.train.hostcopy import BUFFER
from sieve.train.partition import Piece


def share(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """This rank's part of what all ranks hold alike: an even cut of every parameter."""
    cut = []
    for piece in pieces:
        size = piece.stop - piece.start
        start, stop = (piece.start + size * r // world_size for r in (rank, rank + 1))
        if start < stop:
            cut.append(piece.narrow(start, stop))
    return cut


class ShardReader:
    """Reads ranges of parameters from a checkpoint's folder; ValueError for what is not there.

    Files are mapped, so that nothing is read but what is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}  # start, stop, file, key
        self._steps: dict[str, int] = {}
        self._files = []
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            for key in file.keys():
                kind, rest = key.split(":", 1)
                name, start = rest.rsplit(":", 1)
                shape = file.get_slice(key).get_shape()
                size = shape[0] if kind != BUFFER else 0
                entry = (int(start), int(start) + size, len(self._files), key)
                self._where.setdefault((kind, name), []).append(entry)
            self._steps |= {
                key.removeprefix("step:"): int(value)
                for key, value in (file.metadata() or {}).items() if key.startswith("step:")
            }
            self._files.append(file)
        for entries in self._where.values():
            entries.sort()

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of the flattened parameter, fp32 [stop - start]."""
        parts, at = [], start
        for begin, end, file, key in self._where.get((kind, name), ()):
            if begin <= at < end:
                part = self._files[file].get_slice(key)[at - begin : min(end, stop) - begin]
                parts.append(part)
                at += len(part)
            if at == stop:
                return parts[0] if len(parts) == 1 else torch.cat(parts)
        raise ValueError(f"{self.folder} has no {kind} of {name} from element {at} to {stop}")

    def step(self, name: str) -> int:
        """How many updates the optimizer has made to a parameter."""
        return self._steps[name]

    def buffer(self, name: str) -> Tensor:
        entries = self._where.get((BUFFER, name))
        if not entries:
            raise ValueError(f"{self.folder} has no buffer {name}")
        return self._files[entries[0][2]].get_tensor(entries[0][3])

    @property
    def buffers(self) -> list[str]:
        """The names of the buffers that are there."""
        return [name for kind, name in self._where if kind == BUFFER]

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece], buffers: dict[str, Tensor]) -> None:
        """Write what was saved into `pieces` and `buffers`."""
        for piece in pieces:
            for kind, into in piece.tensors.items():
                into.copy_(self.read(kind, piece.name, piece.start, piece.stop))
            piece.step.fill_(self.step(piece.name))
        for name, buffer in buffers.items():
            buffer.copy_(self.buffer(name))
