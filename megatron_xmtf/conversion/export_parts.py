"""Write the weights of a checkpoint into safetensors files: several processes, bounded memory, and it can go on.

    parent     every file at its full length, headers in place
    process    task after task, each some rows of some tensors: read and hash, take apart, convert, write, flush
    parent     each finished task into the journal

    MODEL.tmp-1f0c/model-00001-of-00003.safetensors ...  journal.json  lock        while it is written

A run that was killed is gone on from by the same command; an error of the input removes all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.manifest import CheckpointManifest, check_found_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES, row_ranges
from megatron_xmtf.conversion.checkpoint_parts import begin_process, fair_share, processes_for
from megatron_xmtf.conversion.finite import change_dtype, check_finite
from megatron_xmtf.conversion.mapping import MatchedParameter
from megatron_xmtf.conversion.safetensors_file import SafetensorsFile
from megatron_xmtf.data.journal import Journal
from megatron_xmtf.data.working_directory import WorkingDirectory
from megatron_xmtf.errors import XmtfError
from megatron_xmtf.progress import Progress
from megatron_xmtf.worker_pool import WorkerPool

__all__ = ["TASK_BYTES", "ExportPlan", "write_weights"]

TASK_BYTES, MOST_BYTES = 512 << 20, 2 << 30
"""What is flushed together and, after a kill, written again in each process; and the most, where files want it."""
AT_HAND_BYTES = 1 << 20
"""What is read, changed and written at a time: it stays in a core's cache from one to the other."""
Rows = tuple[tuple[int, int, int], ...]
"""(number of the parameter, first, last)."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes where; the same in every process."""

    checkpoint: Path
    directory: Path
    parameters: Sequence[MatchedParameter]
    """In the order in which the checkpoint's files hold them."""
    files: Sequence[SafetensorsFile]
    types: Mapping[str, torch.dtype]
    """Hugging Face name -> type to write."""
    repeated: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face name -> a second name under which the same numbers are written."""
    manifest: CheckpointManifest | None = None
    """Of the checkpoint: files are compared with its hashes before anything is taken from them; None: they are not."""


@dataclass(frozen=True)
class Task:
    """Rows to write, and the files of the checkpoint to compare with their hashes meanwhile."""

    number: int
    rows: Rows
    files: tuple[str, ...]


class _Opened:
    """A plan with the checkpoint and the files open; lives as long as its process."""

    def __init__(self, plan: ExportPlan) -> None:
        self.plan = plan
        self.stack = ExitStack()
        self.reader = self.stack.enter_context(CheckpointReader(plan.checkpoint, once=True))
        self.files: dict[str, tuple[SafetensorsFile, int]] = {}
        for file in plan.files:
            stream = self.stack.enter_context(open(plan.directory / file.name, "r+b", buffering=0))
            self.files.update({header.name: (file, stream.fileno()) for header in file.headers})


def write_weights(
    plan: ExportPlan, directory: WorkingDirectory, *, key: Mapping[str, Any], workers: int | None = None
) -> None:
    """Write all weights of a plan into its directory, or what an interrupted run left of them.

    Args:    directory: whose journal says what is done. key: of the journal. workers: processes; None: two a
             core where the model is large.
    Raises:  NonFiniteError: NaN or Inf. CorruptCheckpointError: a file was altered, or a chunk cannot be read.
    """
    parts = list(_cut(plan))
    done: set[int] = set()
    if directory.journal is not None and all((plan.directory / file.name).is_file() for file in plan.files):
        done = set(directory.journal.progress["tasks"])
    else:
        for file in plan.files:
            (plan.directory / file.name).unlink(missing_ok=True)
            file.create(plan.directory)
    todo = list(_with_files(plan, [(number, rows) for number, rows in enumerate(parts) if number not in done]))
    sizes = [sum(_bytes(plan, *part) for part in rows) for rows in parts]
    total, written = sum(sizes), sum(sizes[number] for number in done)
    # Each waits for the disk a third of its time, and holds a few MiB.
    workers = min(workers or processes_for(total, a_core=2), len(todo) or 1)
    with (
        Progress("export", total=round(total / 1e6), unit="MB", done=round(written / 1e6)) as progress,
        WorkerPool(workers, state=plan, setup=_Opened, after_fork=partial(begin_process, directory)) as pool,
    ):
        for task, _ in zip(todo, pool.map(_do, todo), strict=True):
            done.add(task.number)
            Journal(dict(key), {"tasks": sorted(done)}, 0, {}, {}).write(plan.directory)
            progress.advance(round((written + sizes[task.number]) / 1e6) - round(written / 1e6))
            written += sizes[task.number]


def _with_files(plan: ExportPlan, tasks: Sequence[tuple[int, Rows]]) -> Iterator[Task]:
    """Put every file of the checkpoint with the first task that reads from it, which compares it with its hash."""
    met: set[str] = set()
    with CheckpointReader(plan.checkpoint) as reader:
        for number, rows in tasks:
            files = dict.fromkeys(name for part in rows for name in _files_of(plan, reader, part))
            yield Task(number, rows, tuple(name for name in files if name not in met) if plan.manifest else ())
            met.update(files)


def _do(opened: _Opened, task: Task) -> None:
    """Write some rows, bring them to the disk, and compare the files that they came from with their hashes."""
    opened.reader.begin_hashing(task.files)
    try:
        touched = _write_rows(opened, task.rows)
    except XmtfError:
        # Where the file was altered, that is the reason for whatever was found in it.
        _compare(opened)
        raise
    _compare(opened)
    for descriptor in touched:
        os.fsync(descriptor)


def _compare(opened: _Opened) -> None:
    if opened.plan.manifest is not None:
        check_found_hashes(opened.plan.checkpoint, opened.plan.manifest, opened.reader.finish_hashing())


def _write_rows(opened: _Opened, rows: Rows) -> set[int]:
    """Write some rows; return the descriptors of the files that they are in."""
    plan, reader, touched = opened.plan, opened.reader, set()
    for number, first, last in rows:
        parameter = plan.parameters[number]
        see = partial(check_finite, name=parameter.ours)
        for begin, end in row_ranges(last - first, reader.row_bytes(parameter.ours), chunk_bytes=AT_HAND_BYTES):
            part = reader.read(parameter.ours, rows=(first + begin, first + end), see=see)
            for name, source_rows, view in parameter.source_views(part, start=first + begin):
                converted = change_dtype(view, plan.types[name], name=parameter.ours).flatten(0, 1)
                for target in (name, *([plan.repeated[name]] if name in plan.repeated else [])):
                    file, descriptor = opened.files[target]
                    file.write_rows(descriptor, target, converted, first=source_rows[0])
                    touched.add(descriptor)
    return touched


def _cut(plan: ExportPlan) -> Iterator[Rows]:
    """Cut all rows, in their order, into what is written together.

    A file of the checkpoint is left in one piece where it can be: whoever hashes it then has its rows at hand.
    """
    total = sum(_bytes(plan, number, 0, parameter.shape[0]) for number, parameter in enumerate(plan.parameters))
    enough = min(TASK_BYTES, fair_share(total))
    rows: list[tuple[int, int, int]] = []
    filled, held = 0, set[str]()
    with CheckpointReader(plan.checkpoint) as reader:
        for number, parameter in enumerate(plan.parameters):
            row_bytes = torch.Size(parameter.shape[1:]).numel() * 4  # at most: the stored type may be wide
            for first, last in parameter.row_ranges(row_bytes, chunk_bytes=CHUNK_BYTES):
                part = (number, first, last)
                files, size = _files_of(plan, reader, part), _bytes(plan, *part)
                goes_on = bool(held.intersection(files))
                if rows and (filled + size > MOST_BYTES if goes_on else 2 * filled > enough):
                    yield tuple(rows)
                    rows, filled, held = [], 0, set()
                rows.append(part)
                filled += size
                held.update(files)
    if rows:
        yield tuple(rows)


def _files_of(plan: ExportPlan, reader: CheckpointReader, part: tuple[int, int, int]) -> list[str]:
    """Return the files of the checkpoint that some rows are in."""
    number, first, last = part
    return reader.files_of(plan.parameters[number].ours, (first, last))


def _bytes(plan: ExportPlan, number: int, first: int, last: int) -> int:
    """Return the bytes that are written of some rows."""
    parameter = plan.parameters[number]
    per_row = torch.Size(parameter.shape[1:]).numel() * plan.types[parameter.hf[0]].itemsize
    return (last - first) * per_row * (2 if any(name in plan.repeated for name in parameter.hf) else 1)
