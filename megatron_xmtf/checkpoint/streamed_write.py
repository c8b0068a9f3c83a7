"""Write a torch_dist checkpoint chunk by chunk, from one process, in memory of one chunk.

torch's own `FileSystemWriter` keeps every tensor of a file until the file is closed, so an import of a 176B model
would need all of it in memory. The layout is the same, and Megatron-Core and torch read it:

    __0_0.distcp   torch.save(chunk) | torch.save(chunk) | ...     next file after `FILE_BYTES`
    .metadata      which chunk of which tensor is at which bytes of which file
    common.pt      what is not sharded: nothing        metadata.json   names the two formats
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

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

from megatron_xmtf.checkpoint.safe_read import COMMON_NAME, METADATA_NAME, check_metadata
from megatron_xmtf.files import write_json

__all__ = ["CHUNK_BYTES", "StreamedWriter", "row_ranges"]

CHUNK_BYTES = 64 << 20
"""Largest chunk: what a conversion holds at once, some times over, in each of its processes."""
FILE_BYTES = 8 << 30
"""A file is closed once it is longer than this."""


def row_ranges(rows: int, row_bytes: int, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Cut `rows` rows into consecutive ranges [start, end) of at most `chunk_bytes`, at least one row each.

    >>> list(row_ranges(5, 10, chunk_bytes=25))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, chunk_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class StreamedWriter:
    """Write chunks of global tensors into a fresh directory; a context manager, complete after `finish`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stream: IO[bytes] | None = None
        self._file_count = 0
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> StreamedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, key: str, tensor: torch.Tensor, *, offsets: Sequence[int], shape: Sequence[int]) -> None:
        """Append one chunk.

        Args:    key: name of the global tensor. tensor: the chunk, on the CPU.
                 offsets: where it begins in the global tensor. shape: of the global tensor.
        """
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
        )
        assert entry.size == torch.Size(shape) and entry.properties.dtype == tensor.dtype, f"{key} changed its mind"
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            # torch.save writes the storage: a slice would take the whole tensor with it.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        stream = self._open()
        begin = stream.tell()
        torch.save(tensor, stream)
        place = _StorageInfo(f"__0_{self._file_count - 1}.distcp", begin, stream.tell() - begin)
        self._places[MetadataIndex(key, offsets)] = place
        if stream.tell() > FILE_BYTES:
            self._close()

    def finish(self) -> None:
        """Write what describes the chunks.

        Raises:  CorruptCheckpointError: the chunks of a tensor do not tile it.
        """
        self._close()
        found = Metadata(
            state_dict_metadata=dict(self._tensors),
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        check_metadata(self.directory, found)
        with open(self.directory / METADATA_NAME, "wb") as stream:
            pickle.dump(found, stream)
        torch.save({}, self.directory / COMMON_NAME)
        formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_json(
            self.directory / "metadata.json", {**formats, "common_backend": "torch", "common_backend_version": 1}
        )

    def _open(self) -> IO[bytes]:
        if self._stream is None:
            self._stream = open(self.directory / f"__0_{self._file_count}.distcp", "wb")
            self._file_count += 1
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
