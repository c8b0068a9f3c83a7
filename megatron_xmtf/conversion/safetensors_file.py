"""Write a safetensors file tensor by tensor, in memory of a few rows.

The library's own `save_file` takes all tensors of a file at once. The layout (safetensors' format description):

    8 bytes    length of the header, little-endian
    header     JSON: name -> {dtype, shape, data_offsets [begin, end)}, padded with spaces to a multiple of 8
    data       the tensors' bytes, little-endian, in the order of the header, without holes
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

__all__ = ["SHARD_BYTES", "SafetensorsWriter", "TensorHeader", "plan_shards"]

SHARD_BYTES = 5_000_000_000
"""Largest file; one tensor that is larger gets its own. 5 GB: what `save_pretrained` did up to transformers 4."""

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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


class SafetensorsWriter:
    """Write the tensors of one file, each in one or several parts, the tensors in any order; a context manager."""

    def __init__(self, path: Path, headers: Sequence[TensorHeader]) -> None:
        assert sys.byteorder == "little", "the format is little-endian, and so is every machine that torch runs on"
        self.path = path
        self.headers = sorted(headers, key=lambda header: (-header.dtype.itemsize, header.name))
        """In the order of the file: wide types first, so that every tensor is aligned; then by name."""
        self._stream: IO[bytes] | None = None
        self._places: dict[str, tuple[int, int]] = {}
        """Name -> where in the file its next rows go, and where it ends."""

    def __enter__(self) -> SafetensorsWriter:
        contents: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for header in self.headers:
            end = begin + header.bytes
            contents[header.name] = {
                "dtype": DTYPE_NAMES[header.dtype],
                "shape": list(header.shape),
                "data_offsets": [begin, end],
            }
            self._places[header.name] = (begin, end)
            begin = end
        text = json.dumps(contents, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._stream = open(self.path, "wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)
        data = self._stream.tell()
        self._places = {name: (data + begin, data + end) for name, (begin, end) in self._places.items()}
        return self

    def write(self, name: str, part: torch.Tensor) -> None:
        """Append the next rows of a tensor.

        Args:  part: on the CPU, in the type of its header.
        """
        assert self._stream is not None, "the file is open inside `with`"
        place, end = self._places[name]
        assert place + part.nbytes <= end, f"{name}: more rows than its header says"
        if self._stream.tell() != place:
            self._stream.seek(place)
        # numpy knows no bfloat16: the bytes are what is written.
        data = part.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._stream.write(data.data)
        self._places[name] = (place + part.nbytes, end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None, "the file is open inside `with`"
        self._stream.close()
        if error is None:
            short = [name for name, (place, end) in self._places.items() if place != end]
            assert not short, f"{self.path}: rows of {', '.join(short)} were never written"
