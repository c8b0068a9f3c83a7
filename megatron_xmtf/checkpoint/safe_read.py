"""Read torch_dist checkpoints that somebody else may have written, without running what is in them.

`.metadata` is a pickle, and torch reads it (and byte objects) with a plain `pickle.load`: a crafted file runs code
before any tensor is read. Here it goes through an unpickler that knows the metadata's own classes and nothing else,
and everything that will be read later is checked first: names stay below the directory, lengths within the files,
and the chunks of each tensor tile it exactly.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_xmtf.errors import ConfigError, CorruptCheckpointError
from megatron_xmtf.files import require_file, safe_child

__all__ = ["CheckpointReader", "StoredTensor", "check_metadata", "check_safe", "read_metadata", "tiling_problem"]

METADATA_NAME = ".metadata"
COMMON_NAME = "common.pt"

ALLOWED_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's name of the same class
    *(
        (metadata.__name__, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (filesystem.__name__, "_StorageInfo"),
    (filesystem.__name__, "_StoragePrefix"),
    # Megatron-Core keeps every rank's plan in the metadata of what it saves.
    *(
        (planner.__name__, name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}
"""What real checkpoints of torch 2.13 and Megatron-Core 0.16.1 name; torch's dtypes besides. All are plain data."""


@dataclass(frozen=True)
class StoredTensor:
    """One global tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


_PythonUnpickler: Any = pickle._Unpickler
"""Typed as Any: its methods are not in the type stubs."""


class _MetadataUnpickler(_PythonUnpickler):
    """Resolve the names in `ALLOWED_GLOBALS` and torch's dtypes; refuse every other.

    The interpreter's own unpickler in Python, not the one in C: that one fills a table as long as the largest index
    that a file names (a crafted 7-byte file costs it minutes and all memory), and cannot guard BUILD.
    Cost: about 2 s for the 20,000 chunks of a 176B model with optimizer state.
    """

    dispatch = dict(_PythonUnpickler.dispatch)

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and isinstance(torch.__dict__.get(global_name), torch.dtype):
            return torch.__dict__[global_name]
        if (module_name, global_name) in ALLOWED_GLOBALS:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint needs")

    def load_build(self) -> None:
        """Set the attributes of an object, never those of a class, which would outlast the file."""
        if isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError(f"it changes the class {self.stack[-2].__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(directory: Path | str) -> Metadata:
    """Read `.metadata` without running anything in it, and check what it says.

    Raises:  MissingError: no such file. CorruptCheckpointError: it names anything but the metadata's own classes
             (the refused name is given), or does not describe the files beside it.
    """
    directory = Path(directory)
    path = require_file(directory / METADATA_NAME)
    try:
        with open(path, "rb") as stream:
            found = _MetadataUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{path} is refused: {error}. It is damaged, or was made to run code; get it from a source that you trust."
        ) from error
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    if not isinstance(found, Metadata):
        raise CorruptCheckpointError(f"{path} holds a {type(found).__name__}, not a checkpoint's metadata.")
    check_metadata(directory, found)
    return found


def check_metadata(directory: Path, found: Metadata) -> None:
    """Check that chunks tile their tensors, and that each is within a file below `directory`.

    Raises:  CorruptCheckpointError: names the entry and what is wrong.
    """
    path = directory / METADATA_NAME
    try:
        for key, entry in found.state_dict_metadata.items():
            problem = _entry_problem(key, entry, found.storage_data)
            if problem is not None:
                raise CorruptCheckpointError(f"{path}: {key} {problem}.")
        sizes: dict[str, int] = {}
        for index, place in found.storage_data.items():
            name = place.relative_path
            if name not in sizes:
                sizes[name] = require_file(safe_child(directory, name)).stat().st_size
            if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
                raise CorruptCheckpointError(
                    f"{path}: {index.fqn} is said to be at bytes {place.offset} to {place.offset + place.length} of "
                    f"{name}, which has {sizes[name]}."
                )
            if place.transform_descriptors:
                raise CorruptCheckpointError(f"{path}: {index.fqn} is stored through {place.transform_descriptors}.")
    except (ConfigError, FileNotFoundError) as error:
        raise CorruptCheckpointError(f"{path}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {type(error).__name__} {error}.") from error


def _entry_problem(key: str, entry: object, places: dict[MetadataIndex, Any]) -> str | None:
    """Say what is wrong with one entry, None if nothing is."""
    if isinstance(entry, BytesStorageMetadata):
        return None if MetadataIndex(key) in places else "is stored nowhere"
    if not isinstance(entry, TensorStorageMetadata):
        return f"is a {type(entry).__name__}"
    for chunk in entry.chunks:
        if MetadataIndex(key, chunk.offsets) not in places:
            return f"has a chunk at {tuple(chunk.offsets)} that is stored nowhere"
    return tiling_problem(entry)


def tiling_problem(entry: TensorStorageMetadata) -> str | None:
    """Say why the chunks do not tile the tensor: out of bounds, a repeated place, or a volume that is not its own."""
    volume = 0
    for chunk in entry.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
            return f"has a chunk of {len(chunk.sizes)} dimensions, the tensor has {len(entry.size)}"
        bounds = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if any(offset < 0 or size < 0 or offset + size > whole for offset, size, whole in bounds):
            return f"has a chunk {tuple(chunk.sizes)} at {tuple(chunk.offsets)}, outside of {tuple(entry.size)}"
        volume += math.prod(chunk.sizes)
    if len({tuple(chunk.offsets) for chunk in entry.chunks}) != len(entry.chunks):
        return "has two chunks at one place"
    if volume != math.prod(entry.size):
        return f"has chunks of {volume:,} elements in all instead of {math.prod(entry.size):,}"
    return None


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
        _load_restricted(stream, directory / COMMON_NAME)


class CheckpointReader:
    """Read tensors of a checkpoint by name, whole or some rows, without Megatron-Core; a context manager.

    Memory: the result and one stored chunk at a time.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.metadata = read_metadata(directory)
        self.tensors: dict[str, StoredTensor] = {
            key: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._name: str | None = None
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def row_parts(self, key: str, *, rows: int) -> list[tuple[int, int]]:
        """Cut the first `rows` rows of a tensor where its stored chunks begin and end.

        Reading these ranges one after another reads every chunk once.
        """
        entry = self.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is not a tensor"
        edges = {0, rows}
        for chunk in entry.chunks:
            edges |= {chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]}
        kept = sorted(edge for edge in edges if edge <= rows)
        return list(zip(kept[:-1], kept[1:], strict=True))

    def read(self, key: str, *, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or its rows [start, end) along the first dimension, in the stored type.

        Args:    key: a name in `tensors`. rows: 0 <= start <= end <= shape[0]; None for all, and for scalars.
        Raises:  CorruptCheckpointError: a chunk cannot be read, or is not of the type or shape that it should be.
        """
        stored = self.tensors[key]
        start, end = rows if rows is not None else (0, stored.shape[0] if stored.shape else 1)
        assert not stored.shape or 0 <= start <= end <= stored.shape[0], f"{key} {stored.shape} has no rows {rows}"
        # Pages of an empty tensor are taken when they are filled: none, where one chunk holds all rows.
        result = torch.empty((end - start, *stored.shape[1:]) if stored.shape else (), dtype=stored.dtype)
        entry = self.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is not a tensor"
        for chunk in entry.chunks:
            if not stored.shape:
                result.copy_(self._chunk(key, chunk, stored.dtype))
                continue
            first, last = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            low, high = max(first, start), min(last, end)
            if low >= high:
                continue
            tensor = self._chunk(key, chunk, stored.dtype)
            if (low, high) == (start, end) and tuple(chunk.sizes[1:]) == stored.shape[1:]:
                return tensor[low - first : high - first]
            place = [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            result[(slice(low - start, high - start), *place)] = tensor[low - first : high - first]
        return result

    def read_into(self, key: str, target: torch.Tensor, *, offsets: Sequence[int]) -> None:
        """Fill `target` with the box of a tensor that begins at `offsets`; what lies outside of the tensor stays.

        Args:    target: [box], any device; its numbers are converted to its type.
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
            stored = self._chunk(key, chunk, entry.properties.dtype)
            target[_slices(begins, ends, offsets)].copy_(stored[_slices(begins, ends, chunk.offsets)])

    def first_place(self, key: str) -> tuple[str, int]:
        """Return file and byte of a tensor's first chunk, to read tensors in the order of the disk; ("", 0): none."""
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata) or not entry.chunks:
            return "", 0
        place = self.metadata.storage_data[MetadataIndex(key, entry.chunks[0].offsets)]
        return place.relative_path, place.offset

    def read_object(self, key: str) -> Any:
        """Return a byte object, read with torch's restricted loader.

        Raises:  CorruptCheckpointError: it holds anything but tensors and plain data.
        """
        return self._load(MetadataIndex(key))

    def _chunk(self, key: str, chunk: metadata.ChunkStorageMetadata, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._load(MetadataIndex(key, chunk.offsets))
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            found = (
                f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise CorruptCheckpointError(
                f"{self.directory}: the chunk of {key} at {tuple(chunk.offsets)} is {found} instead of "
                f"{dtype} {tuple(chunk.sizes)}; the checkpoint is damaged."
            )
        return tensor

    def _load(self, index: MetadataIndex) -> Any:
        place = self.metadata.storage_data[index]
        path = self.directory / place.relative_path
        if self._name != place.relative_path or self._stream is None:
            if self._stream is not None:
                self._stream.close()
            self._stream, self._name = open(path, "rb"), place.relative_path
        assert isinstance(self._stream, io.IOBase), "a stream opened by `open`"
        view = _create_file_view(self._stream, place.offset, place.length)
        return _load_restricted(view, f"{path}, {index.fqn}")


def _slices(begins: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """Return [begins, ends) as slices counted from `origin`."""
    return tuple(slice(begin - o, end - o) for begin, end, o in zip(begins, ends, origin, strict=True))


def _load_restricted(stream: Any, what: Path | str) -> Any:
    """Load with `weights_only`; never a second try without it."""
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()
        named = next((line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise CorruptCheckpointError(
            f"{what} is refused: it holds more than tensors and plain data ({named}). Get it from a source you trust."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptCheckpointError(f"{what} is damaged: {str(error).splitlines()[0]}.") from error
