"""Write a checkpoint of step 0 out of a source of tensors: several processes, bounded memory, and it can go on.

    plan       chunks of the tensors, in order, dealt to files of about `FILE_BYTES`; before each file, the files of
               the source that it takes from, those with checksums, once each
    process    one task after another: compare with checksums; or read, convert, write, hash, flush
    parent     each finished file into the journal; at the end .metadata, manifest, one rename

    CKPT.tmp-1f0c/__0_0.distcp  __0_1.distcp ...  journal.json  lock        while it is written

What is compared is read again by the file behind it, out of the system's cache.

A run that was killed is gone on from by the same command: files in the journal are on the disk and are kept. An error
of the input (a tensor that is not finite, a damaged file) removes all of it.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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

from megatron_xmtf.allocator import keep_freed_memory
from megatron_xmtf.checkpoint.manifest import FileEntry, finish_checkpoint
from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES
from megatron_xmtf.checkpoint.safe_read import COMMON_NAME, FORMATS, METADATA_NAME, check_metadata
from megatron_xmtf.checkpoint.shard_writer import write_shard
from megatron_xmtf.conversion.tensor_source import SourceTensor, TensorSource, common_dtype
from megatron_xmtf.data.journal import JOURNAL, Journal, input_identity
from megatron_xmtf.data.part_file import WrittenFile
from megatron_xmtf.data.working_directory import LOCK, WorkingDirectory, working_directory
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import disk_errors, write_json
from megatron_xmtf.progress import Progress
from megatron_xmtf.read_ahead import read_ahead
from megatron_xmtf.worker_pool import WorkerPool

__all__ = [
    "FILE_BYTES",
    "CheckpointDescription",
    "WrittenCheckpoint",
    "begin_process",
    "fair_share",
    "processes_for",
    "write_checkpoint",
]

FILE_BYTES = 1 << 30
"""What a killed conversion loses at most, in each process; a 176B model has 330 files."""
FEWEST_SHARES = 16
"""So that processes end at about the same time; of small models fewer."""
BYTES_A_PROCESS = 2 << 30
"""A process takes seconds to start: a smaller model is written by this one."""

OpenSource = Callable[[], TensorSource]


@dataclass(frozen=True)
class CheckpointDescription:
    """What the manifest says of a checkpoint besides its files."""

    architecture: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written."""

    dtype: str
    """Of all tensors; `mixed` where they differ."""
    notes: Mapping[str, float]
    """What the source noticed (`TensorSource.take_notes`), an interrupted run's included."""


@dataclass(frozen=True)
class _Part:
    """One file: chunks as (number of the tensor, first row, last row)."""

    name: str
    chunks: tuple[tuple[int, int, int], ...]


def write_checkpoint(
    output: Path | str,
    source: TensorSource,
    open_source: OpenSource,
    *,
    describe: CheckpointDescription,
    add_files: Callable[[Path], object],
    settings: Mapping[str, Any],
    workers: int | None = None,
    restart: bool = False,
    what: str = "import",
) -> WrittenCheckpoint:
    """Write a checkpoint and give it its name when it is whole.

    Memory: a few times `row_ranges.CHUNK_BYTES` in each process.

    Args:    source: opened; read by this process where one is enough. open_source: opens it in others; picklable.
             add_files: writes what else belongs to the checkpoint, its `hf/`, into the directory given. settings: what
             the bytes depend on besides the source's files. workers: processes; None: as many as there are cores where
             the model is large. restart: throw away what an interrupted conversion left. what: the conversion's name.
    Raises:  ConfigError: `output` exists. DatasetError: another conversion to it runs, or an interrupted one was
             another. What the source raises. On any XmtfError nothing is left of it.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists already and is not overwritten; remove it or choose another name.")
    key = {"inputs": [input_identity(path) for path in source.files], "what": what, **settings}
    with disk_errors(output), working_directory(output, key=key, restart=restart) as directory:
        run = _Writing(directory, key, source)
        run.write(open_source, workers=workers or processes_for(sum(tensor.bytes for tensor in run.tensors)), what=what)
        written = WrittenCheckpoint(common_dtype(run.tensors), run.notes)
        run.finish(output, describe, add_files, dtype=written.dtype)
    return written


def begin_process(directory: WorkingDirectory) -> None:
    """Be a forked process of a conversion: the lock is the parent's alone, OpenMP's threads did not come along.

    What the imports left is never looked through for garbage again, which would copy the pages shared with the parent.
    """
    gc.freeze()
    directory.release()
    torch.set_num_threads(1)


def processes_for(total_bytes: int, *, a_core: int = 1) -> int:
    """Return how many processes write so much: some a core, up to 8, where they are worth their start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(a_core * cores, 8, total_bytes // BYTES_A_PROCESS))


def fair_share(total_bytes: int) -> int:
    """Return how much of a model a process does at a time, so that processes end together: a chunk at least."""
    return max(CHUNK_BYTES, total_bytes // FEWEST_SHARES)


class _Writing:
    """The parts of one checkpoint, and which of them are done."""

    def __init__(self, directory: WorkingDirectory, key: dict[str, Any], source: TensorSource) -> None:
        self.directory, self.key, self.source = directory, key, source
        self.tensors = list(source.tensors)
        self.parts = list(_plan(self.tensors))
        self.files: dict[str, WrittenFile] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}
        """File -> (offset, length) of each of its chunks."""
        self.notes: dict[str, float] = {}
        if directory.journal is not None:
            self._take_up(directory.journal)

    def write(self, open_source: OpenSource, *, workers: int, what: str) -> None:
        """Write the parts that are missing."""
        sizes = {part.name: sum(self._bytes(*chunk) for chunk in part.chunks) for part in self.parts}
        done, total = sum(sizes[name] for name in self.files), sum(sizes.values())
        todo = list(self._tasks())
        workers = min(workers, len(todo) or 1)
        state = (open_source if workers > 1 else lambda: self.source, self.directory.path)
        with (
            Progress(what, total=round(total / 1e6), unit="MB", done=round(done / 1e6)) as progress,
            WorkerPool(workers, state=state, setup=_Worker, after_fork=partial(begin_process, self.directory)) as pool,
        ):
            for task, outcome in zip(todo, pool.map(_do, todo), strict=True):
                if outcome is None or isinstance(task, Path):
                    continue
                self.files[task.name] = WrittenFile(outcome.entry.bytes, outcome.entry.sha256)
                self.places[task.name] = outcome.places
                self._add_notes(outcome.notes)
                self._journal().write(self.directory.path)
                progress.advance(round((done + sizes[task.name]) / 1e6) - round(done / 1e6))
                done += sizes[task.name]

    def _tasks(self) -> Iterator[_Part | Path]:
        """Give the parts that are missing, each behind the files to compare with their checksums for it."""
        compared: set[Path] = set()
        for part in self.parts:
            if part.name not in self.files:
                names = dict.fromkeys(self.tensors[number].name for number, _, _ in part.chunks)
                wanted = dict.fromkeys(path for name in names for path in self.source.files_to_check(name))
                yield from (path for path in wanted if path not in compared)
                compared.update(wanted)
                yield part

    def _add_notes(self, notes: Mapping[str, float]) -> None:
        for name, number in notes.items():
            self.notes[name] = max(number, self.notes.get(name, number))

    def finish(
        self, output: Path, describe: CheckpointDescription, add_files: Callable[[Path], object], *, dtype: str
    ) -> None:
        """Describe the chunks, add the side files, publish."""
        path = self.directory.path
        metadata = Metadata(
            state_dict_metadata={tensor.name: _describe(tensor) for tensor in self.tensors},
            storage_data={
                MetadataIndex(self.tensors[number].name, self.tensors[number].box(first, last)[0]): _StorageInfo(
                    part.name, *place
                )
                for part in self.parts
                for (number, first, last), place in zip(part.chunks, self.places[part.name], strict=True)
            },
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        check_metadata(path, metadata)
        with open(path / METADATA_NAME, "wb") as stream:
            pickle.dump(metadata, stream)
        torch.save({}, path / COMMON_NAME)
        write_json(path / "metadata.json", FORMATS)
        add_files(path)
        for name in (JOURNAL, LOCK):
            (path / name).unlink(missing_ok=True)
        finish_checkpoint(
            path,
            output,
            step=0,
            architecture=describe.architecture,
            dtype=dtype,
            config=None,
            consumed_rows=0,
            contents=["model"],
            origin=describe.origin,
            written={name: FileEntry(entry.bytes, entry.sha256) for name, entry in self.files.items()},
        )

    def _journal(self) -> Journal:
        return Journal(self.key, {"places": self.places, "notes": self.notes}, 0, self.files, {})

    def _take_up(self, journal: Journal) -> None:
        """Keep the files that an interrupted run finished, and remove those that it had begun."""
        places = journal.progress.get("places", {})
        self.notes = dict(journal.progress.get("notes", {}))
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


def _plan(tensors: Sequence[SourceTensor]) -> Iterator[_Part]:
    """Deal the chunks to files in their order."""
    chunks: list[tuple[int, int, int]] = []
    filled = count = 0
    file_bytes = min(FILE_BYTES, fair_share(sum(tensor.bytes for tensor in tensors)))
    for number, tensor in enumerate(tensors):
        for first, last in tensor.chunks:
            if chunks and filled + (last - first) * tensor.row_bytes > file_bytes:
                yield _Part(f"__0_{count}.distcp", tuple(chunks))
                chunks, filled, count = [], 0, count + 1
            chunks.append((number, first, last))
            filled += (last - first) * tensor.row_bytes
    if chunks:
        yield _Part(f"__0_{count}.distcp", tuple(chunks))


def _describe(tensor: SourceTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=tensor.dtype),
        torch.Size(tensor.shape),
        [ChunkStorageMetadata(*tensor.box(first, last)) for first, last in tensor.chunks],
    )


class _Worker:
    """The source, opened in a process, with which it ends."""

    def __init__(self, state: tuple[OpenSource, Path]) -> None:
        keep_freed_memory()
        open_source, self.directory = state
        self.source = open_source().__enter__()
        self.tensors = self.source.tensors


@dataclass(frozen=True)
class _Outcome:
    """A file that was written: its size and hash, (offset, length) of its chunks, what the source noticed."""

    entry: FileEntry
    places: list[tuple[int, int]]
    notes: dict[str, float]


def _do(worker: _Worker, task: _Part | Path) -> _Outcome | None:
    """Compare a file of the source with its checksums, or write one file of the checkpoint."""
    if isinstance(task, Path):
        worker.source.check(task)
        return None

    def read(chunk: tuple[int, int, int]) -> torch.Tensor:
        number, first, last = chunk
        tensor = worker.tensors[number]
        data = worker.source.read(tensor.name, (first, last))
        assert data.dtype == tensor.dtype and data.shape == tensor.box(first, last)[1], tensor.name
        return data

    items = ((MetadataIndex(f"{chunk[0]}", (chunk[1],)), data) for chunk, data in read_ahead(task.chunks, read))

    # The zip archive's own checksums are left out: each file has its SHA-256.
    checks = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with disk_errors(worker.directory / task.name):
            places, files = write_shard(worker.directory, task.name, items)
    finally:
        torch.serialization.set_crc32_options(checks)
    places_in_file = [(place.offset, place.length) for place in places.values()]
    return _Outcome(files[task.name], places_in_file, dict(worker.source.take_notes()))
