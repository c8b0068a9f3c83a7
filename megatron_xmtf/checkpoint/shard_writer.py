"""Write one rank's part of a checkpoint in a process beside the training, and say how it went, whatever happens.

    training rank    stage: GPU tensors to pinned memory        fork        train on              poll, or wait
    writer process                                              snapshot    write, hash, flush    read back, report

The fork is the snapshot: pages of the CPU are shared until the training writes to them, so a CPU run copies nothing
at once. The writer is one process without queues and managers: it reports through a pipe, so its death is seen as
the pipe's end, and it ends when its rank is gone. Megatron-Core's writers wait for each other without a limit.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_xmtf.checkpoint.agreement import Failure
from megatron_xmtf.checkpoint.manifest import FileEntry
from megatron_xmtf.files import sha256_file
from megatron_xmtf.streamed_io import BLOCK_BYTES, write_once

__all__ = ["ShardItem", "ShardWriter", "WrittenPart", "stage_items", "write_shard"]

ShardItem = tuple[MetadataIndex, torch.Tensor | bytes]
"""A chunk of a global tensor, or a pickled object, and its name and place."""
FILES_A_RANK = 2
"""Shards of a rank, written and hashed by a thread each."""
FILE_BYTES = 8 << 30
"""A rank with more data than twice this writes more shards, so that a reader's hashing has parts to share."""
HASHED_BYTES = 1 << 18
"""What is copied and hashed at a time; several of it fit into a core's cache."""
KILL_SECONDS = 5.0
"""How long a killed writer is waited for: one in an uninterruptible wait for a dead file server never ends."""


@dataclass(frozen=True)
class WrittenPart:
    """What a writer has put on the disk."""

    places: dict[MetadataIndex, _StorageInfo]
    """Where each chunk is."""
    files: dict[str, FileEntry]
    """Relative name -> size and SHA-256 of what was meant to be written, which is what was read back."""


def stage_items(items: Sequence[ShardItem]) -> list[ShardItem]:
    """Copy what is on a GPU to pinned host memory, and return when all copies are there; CPU tensors stay.

    The caller keeps the result until the writer has ended: pinned memory is not copied by a fork, and would be
    handed out again.
    """
    if all(not isinstance(data, torch.Tensor) or data.device.type == "cpu" for _, data in items):
        return list(items)
    staged = [
        (index, data.to("cpu", non_blocking=True) if isinstance(data, torch.Tensor) else data) for index, data in items
    ]
    torch.cuda.synchronize()
    return staged


class ShardWriter:
    """A running writer of one rank.

    Args:    directory: fresh, exists. rank: names the files `__{rank}_{n}.distcp`. items: on the CPU.
             common: written as `common.pt`; None on all ranks but one. side_files: copied to `hf/`; likewise.
             timeout_seconds: the writer is killed when it has not finished by then.
    Raises:  OSError: no process could be started.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        items: Sequence[ShardItem],
        common: Mapping[str, Any] | None,
        side_files: Path | None,
        timeout_seconds: float,
    ) -> None:
        self._items = items
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._outcome: WrittenPart | Failure | None = None
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_writer_main, args=(directory, rank, items, common, side_files, sender), name=f"writer{rank}"
        )
        # What the training holds is no garbage of the writer's; collecting it there could touch the GPU.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._process.start()
        finally:
            sender.close()
            if collects:
                gc.enable()

    @property
    def process_id(self) -> int | None:
        """Of the writer, for messages and tests."""
        return self._process.pid

    def poll(self, seconds: float = 0.0) -> WrittenPart | Failure | None:
        """Return what came of it, None while it writes; waits at most `seconds`."""
        if self._outcome is not None:
            return self._outcome
        if self._receiver.poll(seconds):
            self._outcome = self._receive()
        elif time.monotonic() > self._deadline:
            minutes = self._timeout_seconds / 60
            self._outcome = Failure(
                f"the writer (process {self.process_id}) had not finished after {minutes:g} minutes and was ended; "
                "is the file system hanging? checkpoint.write_timeout_minutes is the limit"
            )
            self._process.kill()
        else:
            return None
        self._process.join(KILL_SECONDS)
        self._receiver.close()
        self._items = ()
        return self._outcome

    def kill(self) -> None:
        """End the writer, if it runs; what it has written is left to the caller."""
        if self._outcome is None:
            self._process.kill()
            self.poll(KILL_SECONDS)

    def _receive(self) -> WrittenPart | Failure:
        try:
            outcome: WrittenPart | Failure = pickle.loads(self._receiver.recv_bytes())
        except (EOFError, OSError, pickle.UnpicklingError):  # nothing, or the half of a report
            self._process.join(KILL_SECONDS)
            code = self._process.exitcode
            how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
            hint = "; SIGKILL is also how a machine without memory ends a process" if code == -signal.SIGKILL else ""
            return Failure(f"the writer (process {self.process_id}) was ended {how}{hint}")
        return outcome


def _writer_main(
    directory: Path,
    rank: int,
    items: Sequence[ShardItem],
    common: Mapping[str, Any] | None,
    side_files: Path | None,
    sender: Connection,
) -> None:
    """Run in the writer: write, report, leave without the rank's exit handlers."""
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Signals that ask a job to stop come to all its processes: the rank decides, and waits for this writer.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # OpenMP's threads did not come along: a parallel region would wait for them for ever.
    torch.set_num_threads(1)
    # The zip archive's own checksums: each file has its SHA-256.
    torch.serialization.set_crc32_options(False)
    try:
        outcome: WrittenPart | Failure = write_part(
            directory, rank=rank, items=items, common=common, side_files=side_files
        )
    except BaseException as error:  # reported to the rank, which raises it on all ranks
        outcome = Failure.of(error)
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    os._exit(0)


def _end_with_parent() -> None:
    """End the writer when its rank is gone: the checkpoint can no longer be finished."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a writer is a child"
    parent.join()
    os._exit(1)


def write_part(
    directory: Path,
    *,
    rank: int,
    items: Sequence[ShardItem],
    common: Mapping[str, Any] | None,
    side_files: Path | None,
) -> WrittenPart:
    """Write the files of one rank, flush them, read them back and compare.

    Raises:  OSError: as the file system says, and EIO-like when a file does not read back as it was written.
    """
    buckets = _even_buckets(items)
    files: dict[str, FileEntry] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with ThreadPoolExecutor(max_workers=FILES_A_RANK) as pool:
        written = [
            pool.submit(write_shard, directory, f"__{rank}_{number}.distcp", bucket)
            for number, bucket in enumerate(buckets)
        ]
        for future in written:
            shard_places, shard_files = future.result()
            places.update(shard_places)
            files.update(shard_files)
    if common is not None:
        with HashedFile(directory / "common.pt") as stream:
            torch.save(dict(common), cast(IO[bytes], stream))
        files["common.pt"] = stream.entry
    if side_files is not None:
        files.update(_copy_side_files(side_files, directory / "hf"))
    for name, entry in files.items():
        _check_written(directory / name, entry)
    return WrittenPart(places, files)


class HashedFile:
    """A new file that hashes what is written to it and is flushed to the disk on a clean exit; a context manager.

    It is written a block at a time, and does not stay in the system's cache.
    """

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "xb", buffering=0)
        self._digest = hashlib.sha256()
        self._block = memoryview(bytearray(BLOCK_BYTES))
        self._filled = self._written = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._write_block()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append."""
        left = memoryview(data).cast("B")
        total = len(left)
        while left:
            count = min(len(left), HASHED_BYTES, BLOCK_BYTES - self._filled)
            piece = self._block[self._filled : self._filled + count]
            # The copy brings the piece into the processor's cache, out of which hashing is twice as fast.
            piece[:] = left[:count]
            self._digest.update(piece)
            self._filled, left = self._filled + count, left[count:]
            if self._filled == BLOCK_BYTES:
                self._write_block()
        return total

    def flush(self) -> None:
        """Do nothing: blocks are written when they are full, the last one on exit. `torch.save` wants the method."""

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self._written + self._filled

    def _write_block(self) -> None:
        write_once(self._stream.fileno(), self._block[: self._filled], self._written)
        self._written, self._filled = self._written + self._filled, 0

    @property
    def entry(self) -> FileEntry:
        """Size and hash of what was written."""
        return FileEntry(self.tell(), self._digest.hexdigest())


def _even_buckets(items: Sequence[ShardItem]) -> list[list[ShardItem]]:
    """Deal items to files of about the same size, the largest first."""
    sized = [(data.nbytes if isinstance(data, torch.Tensor) else len(data), (index, data)) for index, data in items]
    count = min(len(items), max(FILES_A_RANK, -(-sum(size for size, _ in sized) // FILE_BYTES)))
    buckets: list[list[ShardItem]] = [[] for _ in range(count)]
    filled = [0] * count
    for size, item in sorted(sized, key=lambda pair: -pair[0]):
        smallest = filled.index(min(filled))
        buckets[smallest].append(item)
        filled[smallest] += size
    return buckets


def write_shard(
    directory: Path, name: str, items: Iterable[ShardItem]
) -> tuple[dict[MetadataIndex, _StorageInfo], dict[str, FileEntry]]:
    """Write one `.distcp` file: chunks one after the other, each as `torch.save` writes it; flushed to the disk.

    Returns: where each item is, in their order; the file's size and hash.
    """
    places = {}
    with HashedFile(directory / name) as stream:
        for index, data in items:
            begin = stream.tell()
            if isinstance(data, torch.Tensor):
                if data.untyped_storage().nbytes() != data.nbytes or not data.is_contiguous():
                    # torch.save writes the storage: a slice would take the whole tensor with it.
                    data = data.clone(memory_format=torch.contiguous_format)
                torch.save(data, cast(IO[bytes], stream))
            else:
                stream.write(data)
            places[index] = _StorageInfo(name, begin, stream.tell() - begin)
    return places, {name: stream.entry}


def _copy_side_files(source: Path, target: Path) -> dict[str, FileEntry]:
    """Copy the Hugging Face side files; return them by their names below the checkpoint."""
    files = {}
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as original, HashedFile(place) as stream:
                shutil.copyfileobj(original, stream)
            files[f"{target.name}/{path.relative_to(source).as_posix()}"] = stream.entry
    return files


def _check_written(path: Path, entry: FileEntry) -> None:
    """Read a file back from its medium, not from the memory it was written through, and compare."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    found = FileEntry(path.stat().st_size, sha256_file(path))
    if found != entry:
        raise OSError(
            f"{path.name} reads back as {found.bytes:,} bytes of SHA-256 {found.sha256[:12]}..., written were "
            f"{entry.bytes:,} of {entry.sha256[:12]}...: the file system or the disk loses data"
        )
