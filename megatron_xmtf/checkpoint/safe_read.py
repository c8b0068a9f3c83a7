"""Read the description of a torch_dist checkpoint that somebody else may have written, without running what is in it.

`.metadata` is a pickle, and torch reads it (and byte objects) with a plain `pickle.load`: a crafted file runs code
before any tensor is read. Here it goes through an unpickler that knows the metadata's own classes and nothing else,
and everything that will be read later is checked first: names stay below the directory, lengths within the files,
and the chunks of each tensor tile it exactly.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_xmtf.checkpoint.stored_chunk import DAMAGE
from megatron_xmtf.errors import ConfigError, CorruptCheckpointError
from megatron_xmtf.files import require_file, safe_child

__all__ = ["COMMON_NAME", "FORMATS", "METADATA_NAME", "check_metadata", "read_metadata", "tiling_problem"]

FORMATS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron-Core's `metadata.json` says of its formats."""
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
    except (*DAMAGE, ImportError) as error:
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
