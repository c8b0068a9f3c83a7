"""Read tensors of a checkpoint by name, some rows at a time, without Megatron-Core and without running anything.

.metadata     which chunk of which tensor is at which bytes of which file: allow-listed (`safe_read`)
*.distcp      the chunks: torch's restricted loader for what describes them, plain bytes for their numbers
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_xmtf.checkpoint.hashed_reading import HashedReading
from megatron_xmtf.checkpoint.safe_read import COMMON_NAME, read_metadata
from megatron_xmtf.checkpoint.stored_chunk import ReadInto, SeeNumbers, StoredChunk, load_restricted
from megatron_xmtf.errors import CorruptCheckpointError
from megatron_xmtf.files import require_file
from megatron_xmtf.streamed_io import OnceReader, SeePiece

__all__ = ["CheckpointReader", "StoredTensor", "check_safe"]

MOST_OPEN = 32
"""Files that a reader keeps open."""


@dataclass(frozen=True)
class StoredTensor:
    """One global tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_safe(directory: Path | str) -> None:
    """Check everything in a checkpoint that torch would unpickle; call it before Megatron-Core's own load.

    `.metadata` through the allow-list; `common.pt` and every byte object with torch's restricted loader.

    Raises:  MissingError, CorruptCheckpointError: names the file or entry and the refused name.
    """
    directory = Path(directory)
    with CheckpointReader(directory) as reader:
        for key, entry in reader.metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                reader.read_object(key)
    with open(require_file(directory / COMMON_NAME), "rb") as stream:
        load_restricted(stream, directory / COMMON_NAME)


class CheckpointReader:
    """An opened checkpoint; a context manager. Memory: what is read, and no more of a chunk than is asked for.

    Args:  once: nothing is read twice, by this process or others: what was read leaves the system's cache.
    """

    def __init__(self, directory: Path | str, *, once: bool = False) -> None:
        self.directory, self._once = Path(directory), once
        self.metadata = read_metadata(directory)
        self.tensors: dict[str, StoredTensor] = {
            key: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._found: dict[MetadataIndex, StoredChunk] = {}
        self._files: dict[str, _File] = {}
        """Those used last stay open: one tensor may lie in a file of each tensor-parallel rank."""
        self._hashed: dict[str, HashedReading] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        for reading in self._hashed.values():
            reading.close()

    def begin_hashing(self, names: Iterable[str]) -> None:
        """Hash files from now on while tensors are read from them."""
        self._hashed |= {name: HashedReading(self.directory / name) for name in names}

    def finish_hashing(self) -> dict[str, str]:
        """Return file -> SHA-256 of all of it, what nobody has asked for included.

        Raises:  CorruptCheckpointError: a file cannot be read.
        """
        found = {}
        for name, reading in self._hashed.items():
            try:
                found[name] = reading.finish()
            except OSError as error:
                raise CorruptCheckpointError(f"{self.directory / name} cannot be read: {error}.") from error
        self._hashed.clear()
        return found

    def read(self, key: str, *, rows: tuple[int, int] | None = None, see: SeeNumbers | None = None) -> torch.Tensor:
        """Return a tensor, or its rows [start, end) along the first dimension, in the stored type.

        Args:    key: a name in `tensors`. rows: 0 <= start <= end <= shape[0]; None for all, and for scalars. see: is
                 shown all numbers that are returned, and perhaps others of the same chunk.
        Raises:  CorruptCheckpointError: a chunk cannot be read, or is not of the type or shape that it should be.
        """
        stored, entry = self.tensors[key], self.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is not a tensor"
        if not stored.shape:
            return self._box(key, entry.chunks[0], stored.dtype, (), see).reshape(())
        start, end = rows if rows is not None else (0, stored.shape[0])
        assert 0 <= start <= end <= stored.shape[0], f"{key} {stored.shape} has no rows {rows}"
        for chunk in entry.chunks:
            first, last = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            if first <= start and end <= last and tuple(chunk.sizes[1:]) == stored.shape[1:]:
                return self._box(key, chunk, stored.dtype, (slice(start - first, end - first),), see)
        result = torch.empty((end - start, *stored.shape[1:]), dtype=stored.dtype)
        self.read_into(key, result, offsets=(start, *(0 for _ in stored.shape[1:])), see=see)
        return result

    def read_into(
        self, key: str, target: torch.Tensor, *, offsets: Sequence[int], see: SeeNumbers | None = None
    ) -> None:
        """Fill `target` with the box of a tensor that begins at `offsets`; what lies outside of the tensor stays.

        Args:    target: [box], any device; the numbers are converted to its type. see: as in `read`.
        Raises:  CorruptCheckpointError: there is no such tensor, it has other dimensions, or a chunk cannot be read.
        """
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata) or len(entry.size) != target.dim():
            found = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
            raise CorruptCheckpointError(
                f"{self.directory} holds no tensor {key} of {target.dim()} dimensions; its shape is {found}."
            )
        for chunk in entry.chunks:
            begins = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
            ends = [
                min(a + size, b + wanted)
                for a, size, b, wanted in zip(chunk.offsets, chunk.sizes, offsets, target.shape, strict=True)
            ]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            stored = self._box(key, chunk, entry.properties.dtype, _slices(begins, ends, chunk.offsets), see)
            target[_slices(begins, ends, offsets)].copy_(stored)

    def row_bytes(self, key: str) -> int:
        """Return the bytes of one row of a tensor, along its first dimension."""
        stored = self.tensors[key]
        return math.prod(stored.shape[1:]) * stored.dtype.itemsize

    def first_place(self, key: str) -> tuple[int, str, int]:
        """Return what sorts tensors as the disk has them: file, __0_9 before __0_10, and byte of the first chunk."""
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata) or not entry.chunks:
            return 0, "", 0
        place = self.metadata.storage_data[MetadataIndex(key, entry.chunks[0].offsets)]
        return len(place.relative_path), place.relative_path, place.offset

    def files_of(self, key: str, rows: tuple[int, int]) -> list[str]:
        """Return the names of the files that hold rows [first, last) of a tensor; a scalar is one row."""
        entry = self.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is not a tensor"
        chunks = [
            chunk
            for chunk in entry.chunks
            if not chunk.sizes or chunk.offsets[0] < rows[1] and rows[0] < chunk.offsets[0] + chunk.sizes[0]
        ]
        places = (self.metadata.storage_data[MetadataIndex(key, chunk.offsets)] for chunk in chunks)
        return list(dict.fromkeys(place.relative_path for place in places))

    def read_object(self, key: str) -> Any:
        """Return a byte object, read with torch's restricted loader.

        Raises:  CorruptCheckpointError: it holds anything but tensors and plain data.
        """
        return self._load(MetadataIndex(key))

    def _box(
        self,
        key: str,
        chunk: ChunkStorageMetadata,
        dtype: torch.dtype,
        box: tuple[slice, ...],
        see: SeeNumbers | None = None,
    ) -> torch.Tensor:
        """Return part of one chunk: [first, last) along its first dimensions; memory of the rows that it is in.

        Of one row of many, as a layer of the stacked ones is, its own rows alone are read.

        Raises:  CorruptCheckpointError: it is not of the type or shape that the description says.
        """
        index = MetadataIndex(key, chunk.offsets)
        place = self.metadata.storage_data[index]
        file, found = self._open(place.relative_path), self._found.get(index)
        if found is None:
            what = f"{self.directory / place.relative_path}, {key}"
            found = StoredChunk.find(file.stream, offset=place.offset, length=place.length, what=what)
            if found.shape != tuple(chunk.sizes) or found.dtype != dtype:
                raise CorruptCheckpointError(
                    f"{self.directory}: the chunk of {key} at {tuple(chunk.offsets)} is {found.dtype} {found.shape} "
                    f"instead of {dtype} {tuple(chunk.sizes)}; the checkpoint is damaged."
                )
            self._found[index] = found
        if found.offset is None or not box or not math.prod(found.shape):
            whole: torch.Tensor = self._load(index)
            if see is not None:
                see(whole)
            return whole[box]
        rows, inner = (box[0].start, box[0].stop), None
        if len(box) > 1 and rows[1] - rows[0] == 1:
            inner = (box[1].start, box[1].stop)
        part = found.read_rows(self._reading(place.relative_path, file, dtype, see), rows, inner=inner)
        return part[(slice(None), *box[1:])] if inner is None else part[(slice(None), slice(None), *box[2:])]

    def _load(self, index: MetadataIndex) -> Any:
        place = self.metadata.storage_data[index]
        view = _create_file_view(self._open(place.relative_path).stream, place.offset, place.length)
        return load_restricted(view, f"{self.directory / place.relative_path}, {index.fqn}")

    def _reading(self, name: str, file: _File, dtype: torch.dtype, see: SeeNumbers | None) -> ReadInto:
        """Return how the numbers of a file's tensors are read."""
        see_piece = None if see is None else lambda piece: see(torch.frombuffer(piece, dtype=dtype))
        if name in self._hashed:
            return partial(self._hashed[name].read_into, see=see_piece)
        if file.once is not None:
            return partial(file.once.read_into, see=see_piece)
        return partial(_read, file.stream.fileno(), see=see_piece)

    def _open(self, name: str) -> _File:
        """Return a file, opened; of many the one that was used the longest ago is closed."""
        file = self._files.pop(name, None)
        if file is None:
            if len(self._files) == MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            stream = open(self.directory / name, "rb")
            file = _File(stream, OnceReader(stream.fileno()) if self._once else None)
        self._files[name] = file
        return file


@dataclass(frozen=True)
class _File:
    """An opened file; `once` reads what is not to stay in the system's cache."""

    stream: io.BufferedReader
    once: OnceReader | None

    def close(self) -> None:
        if self.once is not None:
            self.once.close()
        self.stream.close()


def _read(descriptor: int, buffer: memoryview, offset: int, *, see: SeePiece | None) -> int:
    """Fill a buffer of bytes; return the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], offset + done)):
        done += count
    if see is not None and len(buffer) == done > 0:
        see(buffer)
    return done


def _slices(begins: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """Return [begins, ends) as slices counted from `origin`."""
    return tuple(slice(begin - o, end - o) for begin, end, o in zip(begins, ends, origin, strict=True))
