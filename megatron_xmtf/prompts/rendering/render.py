"""Rows x templates -> prompted records, in the order of the rows, and a count of everything that became none.

    rows        {"premise": "...", "choice1": "...", "choice2": "...", "question": "cause", "label": 0, "id": "r7"}
    template    cause_or_effect, of promptsource or of our own form
    record      {"inputs": "My eyes became red. Why?", "targets": "I cried.", "id": "r7", "dataset": "xcopa",
                 "config": "en", "split": "val", "language": "en", "template": "cause_or_effect",
                 "template_language": "en", "task": "causal_choice", "choices": ["I cried.", "I laughed."]}

A record is a pure function of (row, template, seed, row id): neither other rows nor other templates, nor the number
of processes, change it. For each template, rows = the sum of the outcomes of `render_report.py`.

`dataset, config, split, language, task` of a record are the caller's, else the row's own field of that name when it
is a string, else the template's. `document` is the row's own, where it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from megatron_xmtf.errors import TemplateError
from megatron_xmtf.prompts.rendering.chunk_renderer import ChunkRenderer, OnError, RenderPlan
from megatron_xmtf.prompts.rendering.prompted_record import PromptedRecord
from megatron_xmtf.prompts.rendering.render_report import RenderReport, TemplateCounts
from megatron_xmtf.prompts.rendering.row_chunks import chunk_rows
from megatron_xmtf.prompts.rendering.sandbox import RenderLimits
from megatron_xmtf.prompts.templates.template import Template
from megatron_xmtf.prompts.templates.variants import PosedTemplate

__all__ = ["count_templates", "render_identified_rows", "render_rows"]


def render_rows(
    rows: Iterable[Mapping[str, Any]],
    templates: Sequence[Template],
    *,
    seed: int,
    dataset: str | None = None,
    config: str | None = None,
    split: str | None = None,
    language: str | None = None,
    task: str | None = None,
    report: RenderReport | None = None,
    on_error: OnError = "raise",
    limits: RenderLimits | None = None,
) -> Iterator[PromptedRecord]:
    """Render every row with every template: row by row, templates in their order.

    A row's id is its field `id`, else its number from 0.

    Args:    rows: JSON values; streamed, some hundreds in memory at a time. seed: of the `choice` filters.
             dataset ... task: metadata of all records. report: filled as the records come.
             on_error: "raise" stops at the first template that fails on a row or breaks a limit; "skip" counts the
             row as failed, gives up a template that breaks a limit or the sandbox, and goes on.
    Raises:  TemplateError: names template, row and reason. RecordError: a row that cannot be a template's variables.
    """
    identified = ((str(row["id"] if "id" in row else number), row) for number, row in enumerate(rows))
    given = {"dataset": dataset, "config": config, "split": split, "language": language, "task": task}
    plan = RenderPlan(
        tuple(PosedTemplate(template) for template in templates), seed, metadata=given, on_error=on_error, limits=limits
    )
    return render_identified_rows(identified, plan, report=report)


def render_identified_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], plan: RenderPlan, *, report: RenderReport | None = None
) -> Iterator[PromptedRecord]:
    """Render rows that come with their ids, by a plan, in this process; otherwise as `render_rows`."""
    report = report if report is not None else RenderReport()
    count_templates(plan, report)
    return _records(rows, plan, report)


def count_templates(plan: RenderPlan, report: RenderReport) -> list[TemplateCounts]:
    """Return the counts of each of a plan's templates, entered in the report.

    Raises:  TemplateError: two templates have the same name.
    """
    names = [posed.name for posed in plan.posed]
    if len(set(names)) != len(names):
        raise TemplateError(
            f"two templates have the same name ({Counter(names).most_common(1)[0][0]!r}); records go by it."
        )
    return [report.templates.setdefault(name, TemplateCounts()) for name in names]


def _records(
    rows: Iterable[tuple[str, Mapping[str, Any]]], plan: RenderPlan, report: RenderReport
) -> Iterator[PromptedRecord]:
    totals = count_templates(plan, report)
    with ChunkRenderer(plan) as renderer, closing(chunk_rows(rows)) as chunks:
        for chunk in chunks:
            done = renderer.render(chunk)
            report.rows += len(chunk)
            for total, counts in zip(totals, done.counts, strict=True):
                total.add(counts)
            for _, _, record in done.records:
                yield record
