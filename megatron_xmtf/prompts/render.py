"""Rows x templates -> prompted records, in the order of the rows, and a count of everything that became none.

    rows        {"premise": "...", "choice1": "...", "choice2": "...", "question": "cause", "label": 0, "id": "r7"}
    template    cause_or_effect, of promptsource or of our own form
    record      {"inputs": "My eyes became red. Why?", "targets": "I cried.", "id": "r7", "dataset": "xcopa",
                 "config": "en", "split": "val", "language": "en", "template": "cause_or_effect",
                 "template_language": "en", "task": "causal_choice", "choices": ["I cried.", "I laughed."]}

A record is a pure function of (row, template, seed, row id): neither other rows nor other templates, nor the number
of processes, change it. read = rendered + blank + no_input + no_target + failed, for each template.

`dataset, config, split, language, task` of a record are the caller's, else the row's own field of that name when it
is a string, else the template's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_xmtf.errors import RecordError, TemplateError
from megatron_xmtf.prompts.sandbox import RenderLimits, RenderWorker
from megatron_xmtf.prompts.templates import Template

__all__ = ["PromptedRecord", "RenderReport", "TemplateCounts", "render_identified_rows", "render_rows"]

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 4 << 20
"""Rows sent to the worker at once: few enough for its memory, enough to make the pipe's cost vanish."""
MAX_ROW_CHARACTERS = 16 << 20
RECORD_FIELDS = ("dataset", "config", "split", "language", "task")


@dataclass(frozen=True)
class PromptedRecord:
    """One row worded by one template."""

    inputs: str
    targets: str
    id: str
    template: str
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    language: str | None = None
    template_language: str | None = None
    task: str | None = None
    choices: list[str] | None = None
    """Answer choices; None: open generation."""
    choice_index: int | None = None
    """Position of `targets` among `choices`; None: open generation, or not among them (counted)."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in a jsonl file; fields that are not known are left out."""
        names = ("inputs", "targets", "id", "dataset", "config", "split", "language", "template", "template_language")
        values = {name: getattr(self, name) for name in (*names, "task", "choices")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TemplateCounts:
    """What became of the rows under one template."""

    rendered: int = 0
    blank: int = 0
    """The template renders nothing at all: it says itself that it does not apply."""
    no_input: int = 0
    no_target: int = 0
    """A row without an answer (a hidden test label)."""
    failed: int = 0
    """An expression of the template raised an error on the row (counted only when errors are skipped)."""
    target_not_in_choices: int = 0
    """Rendered all the same; such a record cannot be ranked."""
    undefined: Counter[str] = field(default_factory=Counter)
    """Names that rendered empty because the row has no such field, and how often."""
    rejected: str | None = None
    """Why the template was given up, if it was."""
    first_failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "undefined": dict(sorted(self.undefined.items()))}


@dataclass
class RenderReport:
    """Counts of a rendering, by template, filled while it runs."""

    rows: int = 0
    templates: dict[str, TemplateCounts] = field(default_factory=dict)

    @property
    def rendered(self) -> int:
        """Records rendered in all."""
        return sum(counts.rendered for counts in self.templates.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        templates = {name: counts.to_json() for name, counts in self.templates.items()}
        return {"rows": self.rows, "rendered": self.rendered, "templates": templates}


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
    on_error: Literal["raise", "skip"] = "raise",
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
    return render_identified_rows(
        identified, templates, seed=seed, metadata=given, report=report, on_error=on_error, limits=limits
    )


def render_identified_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    templates: Sequence[Template],
    *,
    seed: int,
    metadata: Mapping[str, str | None] | None = None,
    report: RenderReport | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    limits: RenderLimits | None = None,
) -> Iterator[PromptedRecord]:
    """Render rows that come with their ids; otherwise as `render_rows`.

    Args:    metadata: `dataset, config, split, language, task` of all records, as far as the caller sets them.
    """
    names = [template.name for template in templates]
    if len(set(names)) != len(names):
        raise TemplateError(
            f"two templates have the same name ({Counter(names).most_common(1)[0][0]!r}); records go by it."
        )
    report = report if report is not None else RenderReport()
    report.templates.update({name: TemplateCounts() for name in names if name not in report.templates})
    return _render(rows, templates, seed, metadata or {}, report, on_error, limits)


def _render(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    templates: Sequence[Template],
    seed: int,
    metadata: Mapping[str, str | None],
    report: RenderReport,
    on_error: Literal["raise", "skip"],
    limits: RenderLimits | None,
) -> Iterator[PromptedRecord]:
    with RenderWorker(limits) as worker:
        for ids, chunk, texts in _chunks(rows):
            report.rows += len(chunk)
            worker.load(texts, ids)
            columns = []
            for template in templates:
                counts = report.templates[template.name]
                outcomes = _outcomes(worker, template, seed, counts, on_error)
                if outcomes is not None:
                    columns.append((template, counts, outcomes))
            for number, row in enumerate(chunk):
                for template, counts, outcomes in columns:
                    record = _record(outcomes[number], template, counts, ids[number], row, metadata, on_error)
                    if record is not None:
                        yield record


def _outcomes(
    worker: RenderWorker, template: Template, seed: int, counts: TemplateCounts, on_error: Literal["raise", "skip"]
) -> list[list[Any]] | None:
    """Render one template over the loaded rows; None when it is, or is now, given up."""
    if counts.rejected is not None:
        return None
    try:
        answer = worker.render(template, seed=seed)
    except TemplateError as error:
        if on_error == "raise":
            raise
        counts.rejected = str(error)
        return None
    counts.undefined.update(answer.undefined)
    return answer.records


def _record(
    outcome: list[Any],
    template: Template,
    counts: TemplateCounts,
    row_id: str,
    row: Mapping[str, Any],
    metadata: Mapping[str, str | None],
    on_error: Literal["raise", "skip"],
) -> PromptedRecord | None:
    """Count one outcome, and make the record if there is one."""
    status = outcome[0]
    if status in ("failed", "malformed"):
        message = f"{template.source}: template {template.name!r} on row {row_id}: {outcome[1]}"
        if on_error == "raise":
            raise TemplateError(f"{message}; mend the template or leave it out.")
        counts.first_failure = counts.first_failure or message
        status = "failed"
    if status != "rendered":
        setattr(counts, status, getattr(counts, status) + 1)
        return None
    _, inputs, targets, choices = outcome
    index = choices.index(targets) if choices and targets in choices else None
    counts.rendered += 1
    counts.target_not_in_choices += bool(choices) and index is None
    fields = {name: _metadata_value(name, metadata, row, template) for name in RECORD_FIELDS}
    return PromptedRecord(
        inputs=inputs,
        targets=targets,
        id=row_id,
        template=template.name,
        template_language=template.language,
        choices=choices or None,
        choice_index=index,
        **fields,
    )


def _metadata_value(
    name: str, metadata: Mapping[str, str | None], row: Mapping[str, Any], template: Template
) -> str | None:
    given = metadata.get(name)
    if given is not None:
        return given
    own = row.get(name)
    if isinstance(own, str) and own:
        return own
    # A template's language is that of the prompt and says nothing about the row's.
    defaults = {"dataset": template.dataset, "config": template.config, "task": template.task}
    return defaults.get(name)


def _chunks(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
) -> Iterator[tuple[list[str], list[Mapping[str, Any]], list[str]]]:
    """Cut the stream into chunks of (ids, rows, the rows' variables as JSON)."""
    ids: list[str] = []
    chunk: list[Mapping[str, Any]] = []
    texts: list[str] = []
    characters = 0
    for row_id, row in rows:
        text = _variables(row, row_id)
        if chunk and (len(chunk) == CHUNK_ROWS or characters + len(text) > CHUNK_CHARACTERS):
            yield ids, chunk, texts
            ids, chunk, texts, characters = [], [], [], 0
        ids.append(row_id)
        chunk.append(row)
        texts.append(text)
        characters += len(text)
    if chunk:
        yield ids, chunk, texts


def _variables(row: Mapping[str, Any], row_id: str) -> str:
    """Word a row as the JSON object of a template's variables; `-` in a field's name becomes `_`."""
    if "answer_choices" in row:
        raise RecordError(f"row {row_id} has a field `answer_choices`, which is the template's own; rename the field.")
    renamed = {str(name).replace("-", "_"): value for name, value in row.items()}
    if len(renamed) != len(row):
        raise RecordError(f"row {row_id} has two fields whose names differ only in - and _; rename one.")
    try:
        text = json.dumps(renamed, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"row {row_id} holds the lone surrogate {text[error.start]!a}, half of a character."
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"row {row_id} holds what is not a JSON value: {error}.") from error
    if len(text) > MAX_ROW_CHARACTERS:
        raise RecordError(f"row {row_id} has {len(text):,} characters; a row may have {MAX_ROW_CHARACTERS:,}.")
    return text
