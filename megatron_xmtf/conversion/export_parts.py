"""Write the weights of a checkpoint into safetensors files: several processes, bounded memory, and it can go on.

    parent     every file at its full length, headers in place
    process    task after task, each some rows of some tensors: read, take apart, convert, write at their places, flush
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

from megatron_xmtf.allocator import keep_freed_memory
from megatron_xmtf.checkpoint.manifest import CheckpointManifest, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES
from megatron_xmtf.conversion.checkpoint_parts import begin_process, processes_for
from megatron_xmtf.conversion.huggingface import convert_part
from megatron_xmtf.conversion.mapping import MatchedParameter
from megatron_xmtf.conversion.safetensors_file import SafetensorsFile
from megatron_xmtf.data.journal import Journal
from megatron_xmtf.data.working_directory import WorkingDirectory
from megatron_xmtf.progress import Progress
from megatron_xmtf.worker_pool import WorkerPool

__all__ = ["TASK_BYTES", "ExportPlan", "write_weights"]

TASK_BYTES = 512 << 20
"""What is flushed together and, after a kill, written again at most in each process."""
Task = tuple[tuple[int, int, int], ...]
"""Rows to write: (number of the parameter, first, last)."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes where; the same in every process."""

    checkpoint: Path
    directory: Path
    parameters: Sequence[MatchedParameter]
    files: Sequence[SafetensorsFile]
    types: Mapping[str, torch.dtype]
    """Hugging Face name -> type to write."""
    repeated: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face name -> a second name under which the same numbers are written."""
    manifest: CheckpointManifest | None = None
    """Of the checkpoint: files are compared with its hashes before anything is taken from them; None: they are not."""


class _Opened:
    """A plan with the checkpoint and the files open; lives as long as its process."""

    def __init__(self, plan: ExportPlan) -> None:
        keep_freed_memory()
        self.plan = plan
        self.stack = ExitStack()
        self.reader = self.stack.enter_context(CheckpointReader(plan.checkpoint))
        self.files: dict[str, tuple[SafetensorsFile, int]] = {}
        for file in plan.files:
            stream = self.stack.enter_context(open(plan.directory / file.name, "r+b", buffering=0))
            self.files.update({header.name: (file, stream.fileno()) for header in file.headers})


def write_weights(
    plan: ExportPlan, directory: WorkingDirectory, *, key: Mapping[str, Any], workers: int | None = None
) -> None:
    """Write all weights of a plan into its directory, or what an interrupted run left of them.

    Args:    directory: whose journal says what is done. key: of the journal. workers: processes; None: as many as
             there are cores where the model is large.
    Raises:  NonFiniteError: NaN or Inf. CorruptCheckpointError: a file was altered, or a chunk cannot be read.
    """
    tasks = list(_tasks(plan))
    done: set[int] = set()
    if directory.journal is not None and all((plan.directory / file.name).is_file() for file in plan.files):
        done = set(directory.journal.progress["tasks"])
    else:
        for file in plan.files:
            (plan.directory / file.name).unlink(missing_ok=True)
            file.create(plan.directory)
    todo = list(_with_checks(plan, [(number, task) for number, task in enumerate(tasks) if number not in done]))
    sizes = [sum(_bytes(plan, *rows) for rows in task) for task in tasks]
    total, written = sum(sizes), sum(sizes[number] for number in done)
    workers = min(workers or processes_for(total), len(todo) or 1)
    with (
        Progress("export", total=round(total / 1e6), unit="MB", done=round(written / 1e6)) as progress,
        WorkerPool(workers, state=plan, setup=_Opened, after_fork=partial(begin_process, directory)) as pool,
    ):
        for (number, _), _ in zip(todo, pool.map(_do, [task for _, task in todo]), strict=True):
            if number is None:
                continue
            done.add(number)
            Journal(dict(key), {"tasks": sorted(done)}, 0, {}, {}).write(plan.directory)
            progress.advance(round((written + sizes[number]) / 1e6) - round(written / 1e6))
            written += sizes[number]


def _with_checks(plan: ExportPlan, tasks: Sequence[tuple[int, Task]]) -> Iterator[tuple[int | None, Task | str]]:
    """Put every file of the checkpoint, to be compared with its hash, in front of the first task that reads from it.

    So its bytes come from the disk once, and the second time out of the system's cache.
    """
    compared: set[str] = set()
    with CheckpointReader(plan.checkpoint) as reader:
        for number, task in tasks:
            for parameter, first, last in task if plan.manifest is not None else ():
                for name in reader.files_of(plan.parameters[parameter].ours, (first, last)):
                    if name not in compared:
                        compared.add(name)
                        yield None, name
            yield number, task


def _do(opened: _Opened, task: Task | str) -> None:
    """Compare a file with its hash, or write some rows."""
    if isinstance(task, str):
        assert opened.plan.manifest is not None, "its hashes were asked for"
        verify_hashes(opened.plan.checkpoint, opened.plan.manifest, names=[task])
    else:
        _write_task(opened, task)


def _write_task(opened: _Opened, task: Task) -> None:
    """Write some rows, and bring them to the disk."""
    plan, touched = opened.plan, set()
    for number, first, last in task:
        parameter = plan.parameters[number]
        part = opened.reader.read(parameter.ours, rows=(first, last))
        for name, rows, view in parameter.source_views(part, start=first):
            converted = convert_part(view, dtype=plan.types[name], name=parameter.ours).flatten(0, 1)
            for target in (name, *([plan.repeated[name]] if name in plan.repeated else [])):
                file, descriptor = opened.files[target]
                file.write_rows(descriptor, target, converted, first=rows[0])
                touched.add(descriptor)
    for descriptor in touched:
        os.fsync(descriptor)


def _tasks(plan: ExportPlan) -> Iterator[Task]:
    """Cut all rows into tasks, in their order."""
    rows: list[tuple[int, int, int]] = []
    filled = 0
    for number, parameter in enumerate(plan.parameters):
        row_bytes = torch.Size(parameter.shape[1:]).numel() * 4  # at most: the stored type may be wide
        for first, last in parameter.row_ranges(row_bytes, chunk_bytes=CHUNK_BYTES):
            size = _bytes(plan, number, first, last)
            if rows and filled + size > TASK_BYTES:
                yield tuple(rows)
                rows, filled = [], 0
            rows.append((number, first, last))
            filled += size
    if rows:
        yield tuple(rows)


def _bytes(plan: ExportPlan, number: int, first: int, last: int) -> int:
    """Return the bytes that are written of some rows."""
    parameter = plan.parameters[number]
    per_row = torch.Size(parameter.shape[1:]).numel() * plan.types[parameter.hf[0]].itemsize
    return (last - first) * per_row * (2 if any(name in plan.repeated for name in parameter.hf) else 1)
