"""Render one part of a job into its files; under a cap its ids are read first, to render few rows in vain."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import TemplateError
from megatron_xmtf.prompts.jobs.output_file import FinishedFile, OutputFile
from megatron_xmtf.prompts.jobs.record_cap import RecordCap, smallest_keys
from megatron_xmtf.prompts.jobs.render_parts import RenderPart
from megatron_xmtf.prompts.readers.bad_rows import RowReport
from megatron_xmtf.prompts.rendering.chunk_renderer import RenderPlan
from megatron_xmtf.prompts.rendering.exemplars import ExemplarPool, build_exemplar_pool
from megatron_xmtf.prompts.rendering.render import count_templates
from megatron_xmtf.prompts.rendering.render_processes import RenderedLines, Work, render_chunks
from megatron_xmtf.prompts.rendering.render_report import RenderReport, TemplateCounts
from megatron_xmtf.prompts.rendering.row_chunks import RowChunk, chunk_rows
from megatron_xmtf.prompts.source_rows import identified_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RenderedPart", "render_part", "summary_of"]

SPARE_FRACTION, SPARE_ROWS = 8, 8
"""Rows that are rendered for a cap beyond it, a part of it and some more: most templates lose a few."""


@dataclass(frozen=True)
class RenderedPart:
    """What a part has become."""

    report: RenderReport
    left_out_rows: int
    """Rows that the sources' `where` leaves out."""
    rejected_rows: dict[str, int]
    """Rows that could not be read, by reason (counted only when errors are skipped)."""
    rejected_exemplar_rows: dict[str, int]
    """Likewise, of the exemplar sources."""
    pool_rows: int
    """Training rows that exemplars were drawn from; 0: no variant has shots."""
    files: dict[str, FinishedFile]
    """By name, relative to the output directory; templates without a record have none."""


def render_part(
    part: RenderPart, *, output_directory: Path, workers: int, on_bytes: Callable[[int], None] | None = None
) -> RenderedPart:
    """Render a part; its files appear at the end, each one whole.

    Raises:  RecordError, TemplateError: rows or templates that fail, unless the part skips them.
    """
    exemplars_read = RowReport()
    pool = _pool(part, exemplars_read)
    plan = RenderPlan(part.posed, part.seed, metadata=part.metadata, on_error=part.on_error, exemplars=pool)
    bounds = _upper_bounds(part)
    while True:
        report, rows_read = RenderReport(), RowReport()
        cap = _cap(part, bounds)
        writer = _PartWriter(part, output_directory, report.templates, count_templates(plan, report), cap)
        try:
            _render_rows(part, plan, writer, report, rows_read, workers, on_bytes)
            bounds = cap.widened_bounds() if cap is not None else None
            if bounds is not None:
                on_bytes = None  # the bar has counted the files
                continue
            if part.posed and not report.rendered and part.on_error == "raise":
                raise TemplateError(f"{part.name}: no record was rendered from {report.rows:,} rows.\n{report.table()}")
            files = writer.finish()
            break
        finally:
            writer.discard()
    pool_rows = len(pool) if pool is not None else 0
    return RenderedPart(report, rows_read.left_out, rows_read.rejected, exemplars_read.rejected, pool_rows, files)


def _render_rows(
    part: RenderPart,
    plan: RenderPlan,
    writer: _PartWriter,
    report: RenderReport,
    rows_read: RowReport,
    workers: int,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Render every row that the cap may keep into the writer."""
    rows = identified_rows(
        part.sources, limit=part.limit, on_bytes=on_bytes, on_bad_row=part.on_error, report=rows_read
    )
    chunks = chunk_rows(rows, reject=rows_read.rejecter(part.on_error))
    with closing(rows), closing(render_chunks(writer.work(chunks), plan, workers=workers)) as rendered:
        for lines in rendered:
            report.rows += lines.rows
            writer.take(lines)


def _cap(part: RenderPart, bounds: NDArray[np.uint64] | None) -> RecordCap | None:
    if part.cap is None or not part.posed:
        return None
    return RecordCap(part.cap, [posed.name for posed in part.posed], seed=part.seed, upper_bounds=bounds)


def _upper_bounds(part: RenderPart) -> NDArray[np.uint64] | None:
    """Read the ids alone, to know which rows the cap will leave out; a dataset on the hub is not read twice."""
    if part.cap is None or not part.posed or not all(source.paths for source in part.sources):
        return None
    with closing(identified_rows(part.sources, limit=part.limit, on_bad_row=part.on_error)) as rows:
        return smallest_keys(
            (row_id for row_id, _ in rows),
            count=part.cap + part.cap // SPARE_FRACTION + SPARE_ROWS,
            names=[posed.name for posed in part.posed],
            seed=part.seed,
        )


def _pool(part: RenderPart, report: RowReport) -> ExemplarPool | None:
    if not part.exemplar_sources:
        return None
    rows = identified_rows(part.exemplar_sources, limit=part.limit, on_bad_row=part.on_error, report=report)
    with closing(rows):
        return build_exemplar_pool(
            rows,
            size=part.exemplars.pool,
            max_characters=part.exemplars.max_characters,
            seed=part.seed,
            reject=report.rejecter(part.on_error),
        )


@dataclass
class _PartWriter:
    """Deal lines out to the files, under the cap."""

    part: RenderPart
    directory: Path
    by_name: dict[str, TemplateCounts]
    totals: list[TemplateCounts]
    cap: RecordCap | None
    outputs: list[OutputFile] = field(init=False)
    keys: list[NDArray[np.uint64]] = field(default_factory=list)
    """Of the chunks that are under way, oldest first."""

    def __post_init__(self) -> None:
        self.outputs = [OutputFile(self.directory / file) for file in self.part.files]

    def work(self, chunks: Iterable[RowChunk]) -> Generator[Work, None, None]:
        """Say of each chunk which rows are to be rendered."""
        for number, chunk in enumerate(chunks):
            if self.cap is None:
                yield chunk, None
                continue
            keys = self.cap.keys(chunk.ids)
            self.keys.append(keys)
            yield chunk, self.cap.rows_to_render(number, keys)

    def take(self, lines: RenderedLines) -> None:
        """Write the lines of the next chunk, and count."""
        for total, counts in zip(self.totals, lines.counts, strict=True):
            total.add(counts)
        if self.cap is None:
            for _, number, line in lines.lines:
                self.outputs[number].append(line)
            return
        keys = self.keys.pop(0)
        allowed = self.cap.merge([(row, number) for row, number, _ in lines.lines], keys)
        for (row, number, line), keep in zip(lines.lines, allowed, strict=True):
            if keep:
                self.outputs[number].append(line, int(keys[row, number]))

    def finish(self) -> dict[str, FinishedFile]:
        """Rename the files into place; what the cap cuts off is counted as left out."""
        thresholds = self.cap.final_thresholds() if self.cap is not None else [0] * len(self.outputs)
        files = {}
        for name, output, total, threshold in zip(self.part.files, self.outputs, self.totals, thresholds, strict=True):
            finished = output.finish(cap=self.part.cap, threshold=threshold)
            records = finished.records if finished is not None else 0
            total.left_out += total.rendered - records
            total.rendered = records
            if finished is not None:
                files[name] = finished
        return files

    def discard(self) -> None:
        """Remove what is not finished."""
        for output in self.outputs:
            output.discard()


def summary_of(part: RenderPart, done: RenderedPart) -> dict[str, Any]:
    """Return a part's entry in the summary."""
    templates = []
    for posed, file in zip(part.posed, part.files, strict=True):
        finished = done.files.get(file)
        templates.append(
            {
                "template": posed.name,
                "template_language": posed.template.language,
                "translation": posed.template.translation,
                "file": file if finished is not None else None,
                "bytes": finished.bytes if finished is not None else 0,
                "sha256": finished.sha256 if finished is not None else None,
                "counts": done.report.templates[posed.name].to_json(),
            }
        )
    return {
        **part.metadata,
        "prompt_language": part.prompt_language,
        "missing_localised": part.missing_localised,
        "rows": done.report.rows,
        "left_out_rows": done.left_out_rows,
        "rejected_rows": dict(sorted(done.rejected_rows.items())),
        "records": done.report.rendered,
        "exemplar_pool_rows": done.pool_rows,
        "rejected_exemplar_rows": dict(sorted(done.rejected_exemplar_rows.items())),
        "not_made": dict(part.not_made),
        "templates": templates,
    }
