"""Write a checkpoint of step 0 out of a source of tensors: several processes, bounded memory, and it can go on.

    plan       chunks of the tensors, in order, dealt to files of about `FILE_BYTES`
    process    one file after another: read, convert, write, hash, flush
    parent     each finished file into the journal; at the end .metadata, manifest, one rename

    CKPT.tmp-1f0c/__0_0.distcp  __0_1.distcp ...  journal.json  lock        while it is written

A run that was killed is gone on from by the same command: files in the journal are on the disk and are kept. An error
of the input (a tensor that is not finite, a damaged file) removes all of it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

from megatron_xmtf.checkpoint.manifest import FileEntry, finish_checkpoint
from megatron_xmtf.checkpoint.safe_read import METADATA_NAME, check_metadata
from megatron_xmtf.checkpoint.saver import FORMATS
from megatron_xmtf.checkpoint.shard_writer import write_shard
from megatron_xmtf.conversion.tensor_source import SourceTensor, TensorSource
from megatron_xmtf.data.journal import JOURNAL, Journal, input_identity
from megatron_xmtf.data.part_file import WrittenFile
from megatron_xmtf.data.working_directory import LOCK, WorkingDirectory, working_directory
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import disk_errors, write_json
from megatron_xmtf.progress import Progress
from megatron_xmtf.worker_pool import WorkerPool

__all__ = ["FILE_BYTES", "CheckpointDescription", "processes_for", "write_checkpoint"]

FILE_BYTES = 1 << 30
"""What a killed conversion loses at most, in each process; a 176B model has 330 files."""
BYTES_A_PROCESS = 2 << 30
"""A process takes seconds to start: a smaller model is written by this one."""

OpenSource = Callable[[], TensorSource]


@dataclass(frozen=True)
class CheckpointDescription:
    """What the manifest says of a checkpoint besides its files."""

    architecture: Mapping[str, Any]
    dtype: str
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """One file: chunks as (number of the tensor, first row, last row)."""

    name: str
    chunks: tuple[tuple[int, int, int], ...]


def write_checkpoint(
    output: Path | str,
    open_source: OpenSource,
    *,
    describe: CheckpointDescription,
    add_files: Callable[[Path], object],
    settings: Mapping[str, Any],
    workers: int | None = None,
    restart: bool = False,
    what: str = "import",
) -> int:
    """Write a checkpoint and give it its name when it is whole.

    Memory: a few times `streamed_write.CHUNK_BYTES` in each process.

    Args:    open_source: picklable; called in each process. add_files: writes what else belongs to the checkpoint, its
             `hf/`, into the directory given. settings: what the bytes depend on besides the source's files.
             workers: processes; None: as many as there are cores where the model is large. restart: throw away what
             an interrupted conversion left.
    Returns: bytes of weights written, those of an interrupted run not counted.
    Raises:  ConfigError: `output` exists. DatasetError: another conversion to it runs, or an interrupted one was
             another. What the source raises. On any XmtfError nothing is left of it.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists already and is not overwritten; remove it or choose another name.")
    with open_source() as source:
        tensors = list(source.tensors)
        key = {"inputs": [input_identity(path) for path in source.files], "what": what, **settings}
    with disk_errors(output), working_directory(output, key=key, restart=restart) as directory:
        run = _Writing(directory, key, tensors, list(_plan(tensors)))
        processes = workers or processes_for(sum(tensor.bytes for tensor in tensors))
        written = run.write(open_source, workers=processes, what=what)
        run.finish(output, describe, add_files)
    return written


def processes_for(total_bytes: int) -> int:
    """Return how many processes write so much: a core each, up to 8, where they are worth their start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 8, total_bytes // BYTES_A_PROCESS))


class _Writing:
    """The parts of one checkpoint, and which of them are done."""

    def __init__(
        self, directory: WorkingDirectory, key: dict[str, Any], tensors: list[SourceTensor], parts: list[_Part]
    ) -> None:
        self.directory, self.key, self.tensors, self.parts = directory, key, tensors, parts
        self.files: dict[str, WrittenFile] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}
        """File -> (offset, length) of each of its chunks."""
        if directory.journal is not None:
            self._take_up(directory.journal)

    def write(self, open_source: OpenSource, *, workers: int, what: str) -> int:
        """Write the parts that are missing; return the bytes of weights in them."""
        todo = [part for part in self.parts if part.name not in self.files]
        sizes = {part.name: sum(self._bytes(*chunk) for chunk in part.chunks) for part in self.parts}
        done = sum(sizes.values()) - sum(sizes[part.name] for part in todo)
        total = sum(sizes.values())
        tasks = [(str(self.directory.path), part) for part in todo]
        with (
            Progress(what, total=round(total / 1e6), unit="MB", done=round(done / 1e6)) as progress,
            WorkerPool(min(workers, len(todo) or 1), state=open_source, setup=_open) as pool,
        ):
            for part, (entry, places) in zip(todo, pool.map(_write_part, tasks), strict=True):
                self.files[part.name] = WrittenFile(entry.bytes, entry.sha256)
                self.places[part.name] = places
                self._journal().write(self.directory.path)
                progress.advance(round((done + sizes[part.name]) / 1e6) - round(done / 1e6))
                done += sizes[part.name]
        return sum(sizes[part.name] for part in todo)

    def finish(self, output: Path, describe: CheckpointDescription, add_files: Callable[[Path], object]) -> None:
        """Describe the chunks, add the side files, publish."""
        path = self.directory.path
        metadata = Metadata(
            state_dict_metadata={tensor.name: _describe(tensor) for tensor in self.tensors},
            storage_data={
                MetadataIndex(self.tensors[number].name, self._offsets(number, first)): _StorageInfo(part.name, *place)
                for part in self.parts
                for (number, first, _), place in zip(part.chunks, self.places[part.name], strict=True)
            },
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        check_metadata(path, metadata)
        with open(path / METADATA_NAME, "wb") as stream:
            pickle.dump(metadata, stream)
        torch.save({}, path / "common.pt")
        write_json(path / "metadata.json", FORMATS)
        add_files(path)
        for name in (JOURNAL, LOCK):
            (path / name).unlink(missing_ok=True)
        finish_checkpoint(
            path,
            output,
            step=0,
            architecture=describe.architecture,
            dtype=describe.dtype,
            config=None,
            consumed_rows=0,
            contents=["model"],
            origin=describe.origin,
            written={name: FileEntry(entry.bytes, entry.sha256) for name, entry in self.files.items()},
        )

    def _journal(self) -> Journal:
        return Journal(self.key, {"places": self.places}, 0, self.files, {})

    def _take_up(self, journal: Journal) -> None:
        """Keep the files that an interrupted run finished, and remove those that it had begun."""
        places = journal.progress.get("places", {})
        for part in self.parts:
            path, entry = self.directory.path / part.name, journal.parts.get(part.name)
            known = places.get(part.name, [])
            whole = entry is not None and path.is_file() and path.stat().st_size == entry.bytes
            if entry is not None and whole and len(known) == len(part.chunks):
                self.files[part.name] = entry
                self.places[part.name] = [(int(offset), int(length)) for offset, length in known]
            else:
                path.unlink(missing_ok=True)

    def _bytes(self, number: int, first: int, last: int) -> int:
        return (last - first) * self.tensors[number].row_bytes

    def _offsets(self, number: int, first: int) -> tuple[int, ...]:
        return (first, *(0 for _ in self.tensors[number].shape[1:]))


def _plan(tensors: Sequence[SourceTensor]) -> Iterator[_Part]:
    """Deal the chunks to files in their order."""
    chunks: list[tuple[int, int, int]] = []
    filled = count = 0
    for number, tensor in enumerate(tensors):
        for first, last in tensor.chunks:
            if chunks and filled + (last - first) * tensor.row_bytes > FILE_BYTES:
                yield _Part(f"__0_{count}.distcp", tuple(chunks))
                chunks, filled, count = [], 0, count + 1
            chunks.append((number, first, last))
            filled += (last - first) * tensor.row_bytes
    if chunks:
        yield _Part(f"__0_{count}.distcp", tuple(chunks))


def _describe(tensor: SourceTensor) -> TensorStorageMetadata:
    rest = tensor.shape[1:]
    return TensorStorageMetadata(
        TensorProperties(dtype=tensor.dtype),
        torch.Size(tensor.shape),
        [
            ChunkStorageMetadata(torch.Size((first, *(0 for _ in rest))), torch.Size((last - first, *rest)))
            for first, last in tensor.chunks
        ],
    )


def _open(open_source: OpenSource) -> TensorSource:
    """Open the source in a process, which ends with it."""
    return open_source().__enter__()


def _write_part(source: TensorSource, task: tuple[str, _Part]) -> tuple[FileEntry, list[tuple[int, int]]]:
    """Write one file; return its size and hash, and where its chunks are."""
    directory, part = task
    tensors = source.tensors

    def items() -> Iterator[tuple[MetadataIndex, torch.Tensor]]:
        for number, first, last in part.chunks:
            tensor = tensors[number]
            data = source.read(tensor.name, (first, last))
            assert data.dtype == tensor.dtype and tuple(data.shape) == (last - first, *tensor.shape[1:]), tensor.name
            yield MetadataIndex(f"{number}", (first,)), data

    # The zip archive's own checksums are left out: each file has its SHA-256.
    checks = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with disk_errors(Path(directory) / part.name):
            places, files = write_shard(Path(directory), part.name, items())
    finally:
        torch.serialization.set_crc32_options(checks)
    return files[part.name], [(place.offset, place.length) for place in places.values()]
