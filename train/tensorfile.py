"""Safetensors files, written as a stream with their checksum and without ever holding more than one tensor.

The format is the public one (github.com/huggingface/safetensors, README): the header's length as a little-endian u64,
a JSON header with each tensor's dtype, shape and place, then the raw values. The library reads it; its writer wants
all tensors in memory at once, knows neither checksum nor fsync, and holds Python's lock while it writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}
_CHUNK = 1 << 24  # bytes: between chunks other threads get their turn


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, list[int]]], tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Write a safetensors file and sync it; its size in bytes and its sha256 in hex. OSError as writing gives it.

    layout: dtype and shape by name, in the file's order. tensor: gives the CPU tensor of a name when its turn comes.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with SyncedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            values = tensor(name).to(dtype).contiguous()
            if list(values.shape) != list(shape):
                raise ValueError(f"{path}: {name} has shape {list(values.shape)} instead of {list(shape)}")
            file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
    return file.size, file.sha256


class SyncedFile:
    """A new file whose sha256 and size are known, and which is on the disk, when its context ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self.size, self.sha256 = path, hashlib.sha256(), 0, ""

    def __enter__(self) -> SyncedFile:
        self._file = self._path.open("wb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for begin in range(0, len(view), _CHUNK):
            chunk = view[begin : begin + _CHUNK]
            self._digest.update(chunk)
            while chunk:  # a write may take less than it was given, on a disk that is nearly full
                chunk = chunk[self._file.write(chunk) :]
        self.size += len(view)

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())
                self.sha256 = self._digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> tuple[int, str]:
    """The same for a small file's contents."""
    with SyncedFile(path) as file:
        file.write(data)
    return file.size, file.sha256


def sha256_of(path: Path) -> str:
    """Of a file's contents, in hex; OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Wait until the disk has the folder's entries: files that were created in it or renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
