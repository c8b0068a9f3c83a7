"""torch_dist files of chunks that lie as a test wants them, written by torch's own `torch.save` and metadata."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_xmtf.checkpoint.manifest import begin_checkpoint, finish_checkpoint

Chunk = tuple[str, torch.Tensor, Sequence[int], Sequence[int]]
"""Name of the global tensor, the chunk, where it begins in the tensor, the tensor's shape."""


def write_chunks(directory: Path, chunks: Iterable[Chunk]) -> None:
    """Write `__0_0.distcp`, `.metadata` and `common.pt` into a directory."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    with open(directory / "__0_0.distcp", "wb") as stream:
        for name, chunk, offsets, shape in chunks:
            properties = TensorProperties(dtype=chunk.dtype)
            entry = tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(shape), []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
            begin = stream.tell()
            torch.save(chunk.clone(memory_format=torch.contiguous_format), stream)
            places[MetadataIndex(name, offsets)] = _StorageInfo("__0_0.distcp", begin, stream.tell() - begin)
    metadata = Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, directory / "common.pt")


def write_training_checkpoint(path: Path, chunks: Iterable[Chunk], *, hf: Path | None = None, **fields: Any) -> Path:
    """Write a checkpoint of such chunks, with the manifest's fields and a copy of the Hugging Face side files."""
    temporary = begin_checkpoint(path)
    write_chunks(temporary, chunks)
    if hf is not None:
        shutil.copytree(hf, temporary / "hf")
    finish_checkpoint(temporary, path, **fields)
    return path
