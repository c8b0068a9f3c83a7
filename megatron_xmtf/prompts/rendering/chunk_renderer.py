"""Render one chunk of rows after another: the work of one process, with the sandboxed worker that belongs to it.

chunk  ->  worker: every row under every template  ->  exemplars put before  ->  records, row by row, and counts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from megatron_xmtf.errors import TemplateError
from megatron_xmtf.prompts.rendering.exemplars import Exemplar, ExemplarDraw, ExemplarPool
from megatron_xmtf.prompts.rendering.prompted_record import RECORD_FIELDS, PromptedRecord
from megatron_xmtf.prompts.rendering.render_report import TemplateCounts
from megatron_xmtf.prompts.rendering.row_chunks import RowChunk
from megatron_xmtf.prompts.rendering.sandbox import RenderAnswer, RenderLimits, RenderWorker
from megatron_xmtf.prompts.templates.delimiters import drawn_delimiter, few_shot_input
from megatron_xmtf.prompts.templates.template import Template
from megatron_xmtf.prompts.templates.variants import PosedTemplate

__all__ = ["ChunkRenderer", "OnError", "RenderPlan", "RenderedChunk"]

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class RenderPlan:
    """Everything that decides the records, beside the rows."""

    posed: tuple[PosedTemplate, ...]
    seed: int
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    """`dataset, config, split, language, task` of all records, as far as the caller sets them."""
    on_error: OnError = "raise"
    """skip: count rows that fail, give up templates that break a limit or the sandbox, and go on."""
    limits: RenderLimits | None = None
    exemplars: ExemplarPool | None = None
    """None: no variant has shots."""


@dataclass
class RenderedChunk:
    """The records of one chunk."""

    records: list[tuple[int, int, PromptedRecord]] = field(default_factory=list)
    """(number of the row, number of the template, record): row by row, templates in their order."""
    counts: list[TemplateCounts] = field(default_factory=list)
    """Of each template."""


class ChunkRenderer:
    """Render chunks by one plan; a context manager that ends the worker."""

    def __init__(self, plan: RenderPlan) -> None:
        self.plan = plan
        self._worker = RenderWorker(plan.limits)
        self._loaded: RowChunk | None = None
        self._rejected: dict[int, str] = {}
        self._draw = ExemplarDraw(plan.exemplars, seed=plan.seed) if plan.exemplars is not None else None
        self._pools: dict[tuple[int, int | None], list[Exemplar | None]] = {}

    def __enter__(self) -> ChunkRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.stop()

    def render(self, chunk: RowChunk, only: Sequence[Sequence[int] | None] | None = None) -> RenderedChunk:
        """Render a chunk.

        Args:    only: for each template the numbers of the rows to render (None: all); the others are left out.
        Raises:  TemplateError: a template that fails on a row or breaks a limit, unless errors are skipped.
        """
        done = RenderedChunk(counts=[TemplateCounts() for _ in self.plan.posed])
        for number, posed in enumerate(self.plan.posed):
            counts = done.counts[number]
            rows = list(range(len(chunk)) if only is None or only[number] is None else only[number] or ())
            counts.left_out = len(chunk) - len(rows)
            if rows and number not in self._rejected:
                try:
                    self._render_rows(number, posed, chunk, rows, done)
                except TemplateError as error:
                    if self.plan.on_error == "raise":
                        raise
                    self._rejected[number] = str(error)
            if number in self._rejected:
                # A template that is given up within a chunk has no record of it.
                done.records = [entry for entry in done.records if entry[1] != number]
                rejected = TemplateCounts(failed=len(rows), left_out=counts.left_out, rejected=self._rejected[number])
                done.counts[number] = rejected
        done.records.sort(key=lambda entry: entry[:2])
        return done

    def _render_rows(
        self, number: int, posed: PosedTemplate, chunk: RowChunk, rows: list[int], done: RenderedChunk
    ) -> None:
        styles = None
        if posed.option_styles:
            styles = [posed.drawn_option_style(chunk.ids[row], seed=self.plan.seed) for row in rows]
        if posed.variant.shots:
            for style in dict.fromkeys(styles) if styles is not None else (None,):
                self._fill_pool(number, posed, style)
        everything = len(rows) == len(chunk)
        answer = self._answer(posed, chunk, None if everything else rows, styles)
        counts = done.counts[number]
        counts.undefined.update(answer.undefined)
        for place, (row, outcome) in enumerate(zip(rows, answer.records, strict=True)):
            if self._counted_out(counts, outcome, posed.template, posed.name, chunk.ids[row]):
                continue
            inputs: str | None = outcome[1]
            if posed.variant.shots:
                pool = self._pools[number, styles[place] if styles is not None else None]
                inputs = self._with_exemplars(posed, outcome[1], chunk, row, pool, counts)
            if inputs is not None:
                done.records.append((row, number, self._record(posed, inputs, outcome, chunk, row, counts)))

    def _answer(
        self, posed: PosedTemplate, chunk: RowChunk, only: list[int] | None, styles: list[int] | None
    ) -> RenderAnswer:
        if self._loaded is not chunk:
            self._worker.load(chunk.texts, chunk.ids)
            self._loaded = chunk
        return self._worker.render(posed, seed=self.plan.seed, only=only, styles=styles)

    def _counted_out(
        self, counts: TemplateCounts, outcome: list[Any], template: Template, name: str, row_id: str
    ) -> bool:
        """Count an outcome that is no record."""
        status = outcome[0]
        if status in ("failed", "malformed"):
            message = f"{template.source}: template {name!r} on row {row_id}: {outcome[1]}"
            if self.plan.on_error == "raise":
                raise TemplateError(f"{message}; mend the template or leave it out.")
            counts.first_failure = counts.first_failure or message
            status = "failed"
        if status == "rendered":
            return False
        setattr(counts, status, getattr(counts, status) + 1)
        return True

    def _fill_pool(self, number: int, posed: PosedTemplate, style: int | None) -> None:
        """Render the pool of exemplars by one template in one style, once."""
        assert self.plan.exemplars is not None, "whoever plans variants with shots plans exemplars"
        if (number, style) in self._pools:
            return
        pool: list[Exemplar | None] = []
        for chunk in self.plan.exemplars.rows:
            styles = None if style is None else [style] * len(chunk)
            for row_id, outcome in zip(chunk.ids, self._answer(posed, chunk, None, styles).records, strict=True):
                out = self._counted_out(TemplateCounts(), outcome, posed.template, posed.name, row_id)
                pool.append(None if out else Exemplar(outcome[1], outcome[2]))
        self._pools[number, style] = pool

    def _with_exemplars(
        self,
        posed: PosedTemplate,
        inputs: str,
        chunk: RowChunk,
        row: int,
        pool: list[Exemplar | None],
        counts: TemplateCounts,
    ) -> str | None:
        """Put exemplars before a prompt; None when none is left or fits."""
        assert self.plan.exemplars is not None and self._draw is not None, "planned with variants that have shots"
        template, shots = posed.template, posed.variant.shots
        key = (str(self.plan.seed), chunk.ids[row], template.name)
        style = drawn_delimiter(posed.delimiters, inputs, language=template.language, key=key)
        drawn = self._draw.draw(
            pool,
            shots=shots,
            row_id=chunk.ids[row],
            document=chunk.fields[row].get("document"),
            template=template.name,
            inputs=inputs,
            worded=lambda exemplar: style.exemplar(exemplar.inputs, exemplar.targets),
            max_characters=self.plan.exemplars.max_characters,
        )
        if not drawn:
            counts.no_exemplar += 1
            return None
        counts.short_of_exemplars += len(drawn) < shots
        return few_shot_input(drawn, inputs, style)

    def _record(
        self, posed: PosedTemplate, inputs: str, outcome: list[Any], chunk: RowChunk, row: int, counts: TemplateCounts
    ) -> PromptedRecord:
        _, _, targets, choices = outcome
        index = choices.index(targets) if choices and targets in choices else None
        counts.rendered += 1
        counts.target_not_in_choices += bool(choices) and index is None
        own, template = chunk.fields[row], posed.template
        # A template's language is that of the prompt and says nothing about the row's.
        defaults = {"dataset": template.dataset, "config": template.config, "task": template.task}
        given = {name: value for name, value in self.plan.metadata.items() if value is not None}
        fields = {name: given.get(name, own.get(name, defaults.get(name))) for name in RECORD_FIELDS}
        return PromptedRecord(
            inputs=inputs,
            targets=targets,
            id=chunk.ids[row],
            template=posed.name,
            document=own.get("document"),
            template_language=template.language,
            choices=choices or None,
            choice_index=index,
            **fields,
        )
