"""What decoding keeps of a text: of NSA full-length K/V for selection alone, the compressed blocks, the raw tokens of
the next block, and a window; of full attention all keys, of window attention the last ones.

Places in memory: [sequence, KV head, place, head_dim]. A sequence's token at position p lies in place p, in a window of
w places in place p % w, compressed block i in place i. Nothing is read on the host, and with one new token a sequence
all shapes are fixed, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from sieve.kernels.common.availability import DTYPES
from sieve.kernels.nsa.decode_reference import TILE
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.phi import AfterPhi, PhiWeights
from sieve.model.chunk import Chunk
from sieve.model.config import AttentionConfig, ModelConfig


class LayerCache:
    """Tensors [B, Hkv, places, D] by name; `_places` says how many each needs for a capacity in tokens."""

    def __init__(self, batch: int, groups: int, dims: dict[str, int], device: torch.device, dtype: torch.dtype) -> None:
        self._tensors = {name: torch.zeros(batch, groups, 0, dim, device=device, dtype=dtype) for name, dim in dims.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def _places(self, name: str, capacity: int) -> int:
        return capacity

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping what is there."""
        for name, old in self._tensors.items():
            more = self._places(name, capacity) - old.shape[2]
            if more > 0:
                self._tensors[name] = torch.cat([old, old.new_zeros(*old.shape[:2], more, old.shape[3])], 2)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` int64 [B'], in that order; one may be taken several times."""
        self._tensors = {name: x.index_select(0, rows) for name, x in self._tensors.items()}

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._tensors.values())

    def _append(self, chunk: Chunk, **new: Tensor) -> None:
        """Packed new tokens [T, Hkv, D] to the places of their positions."""
        for name, x in new.items():
            row, place = chunk.place
            self._tensors[name][row, :, place] = x

    def _roll(self, chunk: Chunk, **new: Tensor) -> None:
        """Packed new tokens into a window's places, over the oldest."""
        for name, x in new.items():
            ring = self._tensors[name]
            if chunk.width == 1:
                row, place = chunk.place
                ring[row, :, place % ring.shape[2]] = x
                continue
            position = chunk.last(ring.shape[2])  # [B, w]
            fresh = position >= chunk.past[:, None]
            token = (chunk.packing.cu_seqlens[:-1, None] + position - chunk.past[:, None]).clamp(0, x.shape[0] - 1)
            ring.copy_(torch.where(fresh[:, None, :, None], x[token.long()].transpose(1, 2), ring))

    def _all(self, chunk: Chunk, names: tuple[str, str]) -> tuple[Tensor, Tensor, None]:
        """Keys and values [B, Hkv, m, D] in the places of their positions, which is what the None says."""
        keys, values = (self[name][:, :, : chunk.longest] for name in names)
        return keys, values, None

    def _window(self, chunk: Chunk, names: tuple[str, str], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the new tokens; keys, values [B, Hkv, W, D] that the chunk's windows reach, and positions [B, W]."""
        size = self[names[0]].shape[2]
        if chunk.width == 1:
            self._roll(chunk, **dict(zip(names, (k, v))))
            return self[names[0]], self[names[1]], chunk.last(size)
        both = [torch.cat([self[name], chunk.pad(x).transpose(1, 2)], 2) for name, x in zip(names, (k, v))]
        position = torch.cat([chunk.ring(size, chunk.past), chunk.new_position], 1)
        self._roll(chunk, **dict(zip(names, (k, v))))
        return *both, position


class FullCache(LayerCache):
    """Of a full-attention layer: every key and value."""

    def extend(self, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, None]:
        """Store packed k, v [T, Hkv, D]; all keys and values [B, Hkv, m, D], position p in place p."""
        self._append(chunk, k=k, v=v)
        return self._all(chunk, ("k", "v"))


class WindowCache(LayerCache):
    """Of a window layer: the last `window` keys and values."""

    def __init__(self, *args, window: int) -> None:
        self.window = window
        super().__init__(*args)

    def _places(self, name: str, capacity: int) -> int:
        return self.window

    def extend(self, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        return self._window(chunk, ("k", "v"), k, v)


class NSACache(LayerCache):
    """Of an NSA layer: k_slc, v_slc of all tokens, k_cmp, v_cmp of the blocks, k_win, v_win of the window, and of the
    l tokens before phi that the next block may begin with, k_raw and v_raw. With share_kv the window and v_raw are
    read from the selection's."""

    def __init__(self, *args, geometry: Geometry) -> None:
        """args: LayerCache's. kernels: whether a step of one token a sequence is stored by Triton's."""
        self.geometry, device = geometry, args[3]
        self.kernels = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        super().__init__(*args)

    def _places(self, name: str, capacity: int) -> int:
        kind = name.split("_")[1]
        if kind == "cmp":  # one to spare takes what is not a block yet
            return -(-(capacity // self.geometry.kernel_stride + 1) // TILE) * TILE
        return {"slc": capacity, "win": self.geometry.window_size, "raw": self.geometry.kernel_size}[kind]

    def all(self, chunk: Chunk) -> tuple[Tensor, Tensor, None]:
        """Keys and values [B, Hkv, m, D] of the selection, position p in place p, the chunk's included."""
        return self._all(chunk, ("k_slc", "v_slc"))

    def _at_once(self, chunk: Chunk) -> bool:
        """Whether `store` takes all the chunk's tokens in one launch, the window's included."""
        return self.kernels and chunk.step and "k_win" in self._tensors

    def store(
        self, k_slc: Tensor, v_slc: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor, v_win: Tensor, chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """Take in packed new tokens [T, Hkv, D], but the window's, which `window` or `roll` does, and the blocks that they
        complete, see `compressed`; returns what phi makes them of, laid out as the chunk's slots say."""
        if not self._at_once(chunk):
            self._append(chunk, k_slc=k_slc, v_slc=v_slc)
            return self._raw(k_cmp, v_cmp, chunk)
        from sieve.kernels.nsa.cache_triton import Stores, store_token  # needs the package triton

        new = {"slc": (k_slc, v_slc), "win": (k_win, v_win), "raw": (k_cmp, v_cmp)}
        return store_token(
            chunk.past, *(Stores(*pair, self[f"k_{kind}"], self[f"v_{kind}"]) for kind, pair in new.items()), self.geometry
        )

    def _raw(self, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Packed k, v [T, Hkv, D] before phi -> what phi compresses; its end is kept."""
        found = []
        for name, x in (("k_raw", k), ("v_raw", v)):
            if name not in self._tensors:
                found.append(self._raw_of_selection(x, chunk))
                continue
            joined = x if chunk.fresh else torch.cat([self[name].transpose(1, 2).flatten(0, 1), x])[chunk.raw_index]
            tail = joined[chunk.tail_index.flatten()].unflatten(0, chunk.tail_index.shape)
            self[name].copy_(tail.transpose(1, 2))
            found.append(joined)
        return found[0], found[1]

    def _raw_of_selection(self, v: Tensor, chunk: Chunk) -> Tensor:
        if chunk.fresh:
            return v
        position = chunk.raw_position.clamp(max=self["v_slc"].shape[2] - 1)  # [B, P]
        return _gather(self["v_slc"], position).transpose(1, 2).flatten(0, 1)

    def compress(
        self, k: Tensor, v: Tensor, k_phi: PhiWeights, v_phi: PhiWeights, after: AfterPhi, chunk: Chunk
    ) -> bool:
        """Make the blocks that this chunk completes from what `store` returned, and store them; False: that is left to phi
        itself and `compressed`, since the chunk is no step, or phi not one that the kernels compute."""
        if not self._at_once(chunk) or k_phi.kind == "mean" or k.dtype not in DTYPES:
            return False
        from sieve.kernels.nsa.phi_triton import compress_token

        compress_token(chunk.past, k, v, self["k_cmp"], self["v_cmp"], k_phi, v_phi, after, self.geometry)
        return True

    def compressed(self, k: Tensor, v: Tensor, chunk: Chunk) -> None:
        """Store the blocks that this chunk completes, from the slots [C, Hkv, D] that phi filled."""
        if self._at_once(chunk):
            from sieve.kernels.nsa.cache_triton import store_block

            return store_block(chunk.past, k, v, self["k_cmp"], self["v_cmp"], self.geometry)
        slot, *_ = chunk.block
        if not slot.numel():
            return
        for name, x in (("k_cmp", k), ("v_cmp", v)):
            place = chunk.block_place(self[name].shape[2] - 1)  # [B, N]
            self[name][chunk.block_row, :, place] = x[slot]

    def window(self, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Store packed k, v [T, Hkv, D]; keys, values [B, Hkv, W, D] and positions [B, W] of the chunk's windows."""
        if self._at_once(chunk):
            return self["k_win"], self["v_win"], chunk.last(self.geometry.window_size)
        if "k_win" in self._tensors:
            return self._window(chunk, ("k_win", "v_win"), k, v)
        size = self.geometry.window_size
        if chunk.width == 1:
            position = chunk.last(size)
        else:
            back = torch.arange(1 - size, chunk.width, dtype=torch.int32, device=k.device)
            position = (chunk.past[:, None] + back).clamp(min=-1)
        place = position.clamp(0, self["k_slc"].shape[2] - 1)
        return _gather(self["k_slc"], place), _gather(self["v_slc"], place), position

    def runs(self, k: Tensor, v: Tensor, chunk: Chunk) -> list[tuple[Tensor, Tensor]]:
        """Store packed k, v [T, Hkv, D]; of each sequence the keys and values [m + n, Hkv, D] of the m tokens before its n
        new ones that their windows reach, and of those, in order."""
        found, places, end = [], self.geometry.window_size, 0
        for row, (past, count) in enumerate(zip(chunk.pasts, chunk.counts)):
            first, end = max(0, past + 1 - places), end + count
            if "k_win" not in self._tensors:
                found.append(tuple(self[name][row, :, first : past + count].transpose(0, 1) for name in ("k_slc", "v_slc")))
                continue
            place = torch.arange(first, past, device=k.device) % places
            rings = (self[name][row][:, place].transpose(0, 1) for name in ("k_win", "v_win"))
            found.append(tuple(torch.cat([ring, x[end - count : end]]) for ring, x in zip(rings, (k, v))))
        self.roll(k, v, chunk)
        return found

    def roll(self, k: Tensor, v: Tensor, chunk: Chunk) -> None:
        """Only store the window's."""
        if "k_win" in self._tensors and not self._at_once(chunk):
            self._roll(chunk, k_win=k, v_win=v)


def _gather(x: Tensor, place: Tensor) -> Tensor:
    """x [B, Hkv, S, D] at places [B, W] -> [B, Hkv, W, D]."""
    return x.gather(2, place.long()[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class Cache:
    """The caches of all layers for `batch` sequences, with room for `capacity` tokens each (see `reserve`).

    lengths: int32 [B] on the device, tokens of each sequence so far. longest: the most of them, known on the host.
    """

    def __init__(
        self, model: ModelConfig, attention: AttentionConfig, batch: int, capacity: int, *,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch={batch} and capacity={capacity} must be at least 1")
        self.geometry, self.capacity, self.longest = attention.geometry(), 0, 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._host = [0] * batch
        self.layers = [
            _layer(kind, model, attention, batch, torch.device(device), dtype)
            for kind in attention.layer_types(model.num_layers)
        ]
        self.reserve(capacity)

    @property
    def batch(self) -> int:
        return self.lengths.numel()

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens a sequence; memory moves when it grows, so do it before capturing a graph."""
        if capacity > self.capacity:
            self.capacity = capacity
            for layer in self.layers:
                layer.reserve(capacity)

    def begin(self, counts: Sequence[int], *, bounded: bool = False) -> Chunk:
        """Lay out a chunk of counts[b] new tokens for sequence b. ValueError when it does not fit.

        bounded: the capacity stands in for the longest sequence's length, so that all shapes stay as sequences grow; who
        asks for it calls `count`, since a step may be replayed.
        """
        longest = self.after(counts)
        return Chunk.of(
            self.lengths, self._host, counts, self.geometry, self.capacity if bounded else longest, fresh=self.longest == 0
        )

    def after(self, counts: Sequence[int]) -> int:
        """The longest sequence's length with counts[b] more tokens; ValueError when they do not fit."""
        if len(counts) != self.batch or min(counts) < 0 or max(counts) < 1:
            raise ValueError(
                f"counts={list(counts)}: give the number of new tokens of each of the {self.batch} sequences, not all 0"
            )
        longest = max(a + b for a, b in zip(self._host, counts))
        if longest > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens a sequence and {longest} would be needed; call reserve({longest})"
            )
        return longest

    def commit(self, chunk: Chunk) -> None:
        """The chunk's tokens are in every layer's cache."""
        self.lengths += chunk.count

    def count(self, counts: Sequence[int]) -> None:
        """Note on the host by how much sequences grew, which a captured graph does on the device alone."""
        self._host = [a + b for a, b in zip(self._host, counts)]
        self.longest = max(self._host)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the sequences `rows`, in that order; one may be taken several times (beam search)."""
        index = torch.as_tensor(list(rows), dtype=torch.int64, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self._host = [self._host[i] for i in rows]
        self.longest = max(self._host)
        for layer in self.layers:
            layer.select(index)

    def bytes(self) -> int:
        """What all layers hold, the room kept for later tokens included."""
        return sum(layer.bytes() for layer in self.layers)


def _layer(
    kind: str, model: ModelConfig, attention: AttentionConfig, batch: int, device: torch.device, dtype: torch.dtype
) -> LayerCache:
    dim_qk, dim_v, rest = model.head_dim_qk, model.head_dim_v, (device, dtype)
    if kind != "nsa":
        args = (batch, model.num_kv_heads, {"k": dim_qk, "v": dim_v}, *rest)
        return WindowCache(*args, window=attention.window_size) if kind == "window" else FullCache(*args)
    names = ["k_slc", "v_slc", "k_cmp", "v_cmp", "k_raw"]
    names += [] if attention.share_kv else ["v_raw", "k_win", "v_win"]
    dims = {name: dim_qk if name[0] == "k" else dim_v for name in names}
    return NSACache(batch, model.num_kv_heads, dims, *rest, geometry=attention.geometry())
