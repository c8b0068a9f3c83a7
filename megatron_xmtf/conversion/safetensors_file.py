"""Write safetensors files a few rows at a time, from several processes, and check the headers of others' files.

The library's own `save_file` takes all tensors of a file at once. The layout (safetensors' format description):

    8 bytes    length of the header, little-endian
    header     JSON: name -> {dtype, shape, data_offsets [begin, end)}, padded with spaces to a multiple of 8
    data       the tensors' bytes, little-endian, in the order of the header, without holes
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError
from megatron_xmtf.streamed_io import write_once

__all__ = ["DTYPES", "SHARD_BYTES", "PlacedTensor", "SafetensorsFile", "TensorHeader", "plan_shards", "read_header"]

SHARD_BYTES = 5_000_000_000
"""Largest file; one tensor that is larger gets its own. 5 GB: what `save_pretrained` did up to transformers 4."""

LONGEST_HEADER = 100_000_000
"""Bytes; the library refuses longer ones as well."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that are converted, in the format's spelling. Quantised ones would need their scales."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorHeader:
    """Name, shape and type of one tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlacedTensor:
    """Where a file has the numbers of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Byte of the file where they begin."""


def read_header(path: Path) -> dict[str, PlacedTensor]:
    """Read where the tensors of a file are, and check that it is what it says, as the library does on opening it.

    Raises:  CorruptCheckpointError: cut off, a header that is no JSON, a tensor that is there twice or whose bytes are
             not where the one before it ends, too many or too few. CheckpointError: another type of weights, or an
             order of numbers that is not torch's.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise _damaged(path, f"its header is {length:,} bytes long")
        try:
            contents = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_once)
            metadata = contents.pop("__metadata__", {})
            found = {name: _read_entry(name, entry) for name, entry in contents.items()}
            framework = metadata.get("format", "pt")
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise _damaged(path, f"its header is not one ({str(error)[:120]})") from error
    if framework != "pt":
        raise CheckpointError(
            f"{path} was written for {framework!r}, whose matrices may be transposed; get the one for torch (`pt`)."
        )
    end, placed = 0, {}
    for name, (kind, shape, begin, last) in sorted(found.items(), key=lambda item: item[1][2:]):
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: {name} has type {kind}; only {', '.join(DTYPES)} weights are converted.")
        wanted = math.prod(shape) * DTYPES[kind].itemsize
        if min(shape, default=0) < 0 or begin != end or last - begin != wanted:
            raise _damaged(
                path, f"{name}, {kind} {list(shape)}, has bytes {begin} to {last}; its own are {end} to {end + wanted}"
            )
        if last > size - 8 - length:
            raise _damaged(path, f"{name} ends {last - (size - 8 - length):,} bytes behind the end of the file")
        placed[name] = PlacedTensor(shape, DTYPES[kind], 8 + length + begin)
        end = last
    if end != size - 8 - length:
        raise _damaged(path, f"{size - 8 - length - end:,} bytes behind its last tensor belong to none")
    return placed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in it twice")
    return found


def _read_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return type, shape and bytes [begin, end) of a tensor.

    Raises:  ValueError: it has not exactly these.
    """
    try:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} has no shape and offsets") from None
    if not isinstance(entry.get("dtype"), str) or not all(type(number) is int for number in numbers):
        raise ValueError(f"{name} has a type that is no word, or a size that is no whole number")
    return entry["dtype"], tuple(shape), begin, end


def _damaged(path: Path, reason: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {reason}. Get it again."
    )


def plan_shards(headers: Sequence[TensorHeader], *, shard_bytes: int = SHARD_BYTES) -> dict[str, list[TensorHeader]]:
    """Deal tensors to files in their order; file names as `save_pretrained` gives them.

    Returns: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on -> its tensors.
    """
    shards: list[list[TensorHeader]] = [[]]
    filled = 0
    for header in headers:
        if shards[-1] and filled + header.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(header)
        filled += header.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


class SafetensorsFile:
    """Where the tensors of one file lie; it is made at its full length, then any rows are written in any order.

    Args:    name: of the file. headers: its tensors.
    """

    def __init__(self, name: str, headers: Sequence[TensorHeader]) -> None:
        assert sys.byteorder == "little", "the format is little-endian, and so is every machine that torch runs on"
        self.name = name
        self.headers = sorted(headers, key=lambda header: (-header.dtype.itemsize, header.name))
        """In the order of the file: wide types first, so that every tensor is aligned; then by name."""
        contents: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for header in self.headers:
            contents[header.name] = {
                "dtype": DTYPE_NAMES[header.dtype],
                "shape": list(header.shape),
                "data_offsets": [begin, begin + header.bytes],
            }
            begin += header.bytes
        text = json.dumps(contents, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self.head = struct.pack("<Q", len(text)) + text
        """Bytes before the tensors' own."""
        self.bytes = len(self.head) + begin
        """Length of the file."""
        self.places: dict[str, int] = {}
        """Tensor -> byte of the file where it begins."""
        self._shapes = {header.name: header.shape for header in self.headers}
        place = len(self.head)
        for header in self.headers:
            self.places[header.name] = place
            place += header.bytes

    def create(self, directory: Path) -> None:
        """Make the file, all its numbers zero."""
        with open(directory / self.name, "xb") as stream:
            stream.write(self.head)
            stream.truncate(self.bytes)
            stream.flush()
            os.fsync(stream.fileno())

    def write_rows(self, descriptor: int, name: str, part: torch.Tensor, *, first: int) -> int:
        """Write rows of a tensor from row `first` on, and return their bytes.

        Args:    descriptor: of the file, opened for writing. part: [rows, ...] on the CPU, in the type of its header.
        """
        place = self.places[name] + first * math.prod(self._shapes[name][1:]) * part.dtype.itemsize
        # numpy knows no bfloat16: the bytes are what is written.
        write_once(descriptor, part.contiguous().reshape(-1).view(torch.uint8).numpy().data, place)
        return part.nbytes
