"""Render chunks in this process or in several, always in the order of the rows.

    workers 1    this process renders a chunk when the next result is asked for
    workers n    n processes, each with a sandboxed worker of its own; at most 3 n chunks are under way

A chunk's result comes back as finished lines, so that the writer only writes. An error is raised where its chunk
stands in the order, whichever process met it first; so is the giving-up of a template.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context, parent_process

from megatron_xmtf.errors import RankFailedError
from megatron_xmtf.prompts.chunk_renderer import ChunkRenderer, RenderPlan
from megatron_xmtf.prompts.render_report import TemplateCounts
from megatron_xmtf.prompts.row_chunks import RowChunk

__all__ = ["MAX_CHUNKS_UNDER_WAY", "RenderedLines", "Work", "render_chunks"]

CHUNKS_PER_WORKER = 3
MAX_CHUNKS_UNDER_WAY = 64
"""However many workers there are: the memory is bounded, and the record caps can count on it."""
FEW_CHUNKS = 4
"""Fewer are not worth the start of processes."""

Work = tuple[RowChunk, Sequence[Sequence[int] | None] | None]
"""A chunk, and for each template the rows to render of it (None: all)."""


@dataclass(frozen=True)
class RenderedLines:
    """One chunk as lines of jsonl."""

    rows: int
    lines: list[tuple[int, int, bytes]]
    """(number of the row in the chunk, number of the template, line with its newline), row by row."""
    counts: list[TemplateCounts]
    without_language: int
    """Records that name no language."""


def render_chunks(work: Iterable[Work], plan: RenderPlan, *, workers: int) -> Generator[RenderedLines, None, None]:
    """Render chunks in order.

    A template that is given up on one chunk has no records of the later ones, and all their rows count as failed.
    Close the generator (`contextlib.closing`) so that an error of the caller ends the workers too.

    Raises:  TemplateError: as `ChunkRenderer.render`. RankFailedError: a worker process was killed.
    """
    rejected: dict[int, str] = {}
    with closing(_rendered(work, plan, workers)) as results:
        for result in results:
            yield _settled(result, rejected)


def _settled(result: RenderedLines, rejected: dict[int, str]) -> RenderedLines:
    """Take back what other processes made of a template after the chunk that it was given up on."""
    for number in rejected:
        left_out = result.counts[number].left_out
        result.counts[number] = TemplateCounts(failed=result.rows - left_out, left_out=left_out)
    rejected.update({number: counts.rejected for number, counts in enumerate(result.counts) if counts.rejected})
    lines = [line for line in result.lines if line[1] not in rejected]
    return replace(result, lines=lines) if rejected else result


def _rendered(work: Iterable[Work], plan: RenderPlan, workers: int) -> Generator[RenderedLines, None, None]:
    stream = iter(work)
    few = list(islice(stream, FEW_CHUNKS)) if workers > 1 else []
    if workers == 1 or len(few) < FEW_CHUNKS:
        with ChunkRenderer(plan) as renderer:
            for chunk, only in chain(few, stream):
                yield _lines(renderer, chunk, only)
        return
    executor = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(plan,)
    )
    pending: deque[Future[RenderedLines]] = deque()
    try:
        for chunk, only in chain(few, stream):
            pending.append(executor.submit(_render_in_worker, chunk, only))
            if len(pending) >= min(CHUNKS_PER_WORKER * workers, MAX_CHUNKS_UNDER_WAY):
                yield _result(pending.popleft(), executor)
        while pending:
            yield _result(pending.popleft(), executor)
    except BrokenProcessPool as error:
        raise RankFailedError(
            f"one of {workers} worker processes was killed, most likely for want of memory; the file at hand was not "
            "written. Run again with fewer workers."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _lines(renderer: ChunkRenderer, chunk: RowChunk, only: Sequence[Sequence[int] | None] | None) -> RenderedLines:
    done = renderer.render(chunk, only)
    lines = [
        (row, number, (json.dumps(record.to_json(), ensure_ascii=False) + "\n").encode("utf-8"))
        for row, number, record in done.records
    ]
    nameless = sum(record.language is None for _, _, record in done.records)
    return RenderedLines(len(chunk), lines, done.counts, nameless)


def _result(future: Future[RenderedLines], executor: ProcessPoolExecutor) -> RenderedLines:
    """Wait for a chunk, and see that the workers live meanwhile.

    A worker killed in the middle of sending leaves half a message, for whose rest the pool would wait for ever. With
    all workers gone and our own writing end closed the pool finds the end of the stream and breaks.
    """
    processes = list((executor._processes or {}).values())
    while not wait([future], timeout=1.0).done:
        if any(process.exitcode is not None for process in processes):
            for process in processes:
                process.kill()
            executor._result_queue._writer.close()  # type: ignore[attr-defined]
            raise BrokenProcessPool("a worker process ended while its chunk was waited for")
    return future.result()


class _Worker:
    """The renderer of a worker process, set once at its start."""

    renderer: ChunkRenderer | None = None


def _start_worker(plan: RenderPlan) -> None:
    """Prepare a worker: Ctrl-C left to the parent, and an end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.renderer = ChunkRenderer(plan)


def _render_in_worker(chunk: RowChunk, only: Sequence[Sequence[int] | None] | None) -> RenderedLines:
    assert _Worker.renderer is not None, "the initializer sets it"
    return _lines(_Worker.renderer, chunk, only)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
