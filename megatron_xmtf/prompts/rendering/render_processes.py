"""Render chunks in this process or in several, always in the order of the rows.

    workers 1    this process renders a chunk when the next result is asked for
    workers n    n processes, each with a sandboxed worker of its own; at most 3 n chunks are under way

A chunk's result comes back as finished lines, so that the writer only writes. An error is raised where its chunk
stands in the order, whichever process met it first; so is the giving-up of a template.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice

from megatron_xmtf.prompts.rendering.chunk_renderer import ChunkRenderer, RenderPlan
from megatron_xmtf.prompts.rendering.render_report import TemplateCounts
from megatron_xmtf.prompts.rendering.row_chunks import RowChunk
from megatron_xmtf.worker_pool import WorkerPool

__all__ = ["MAX_CHUNKS_UNDER_WAY", "RenderedLines", "Work", "render_chunks"]

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
                yield _lines(renderer, (chunk, only))
        return
    with WorkerPool(workers, state=plan, setup=ChunkRenderer, max_ahead=MAX_CHUNKS_UNDER_WAY) as pool:
        yield from pool.map(_lines, chain(few, stream))


def _lines(renderer: ChunkRenderer, work: Work) -> RenderedLines:
    chunk, only = work
    done = renderer.render(chunk, only)
    lines = [
        (row, number, (json.dumps(record.to_json(), ensure_ascii=False) + "\n").encode("utf-8"))
        for row, number, record in done.records
    ]
    nameless = sum(record.language is None for _, _, record in done.records)
    return RenderedLines(len(chunk), lines, done.counts, nameless)
