"""Read the records of a task as questions with their answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.data.line_chunks import read_chunks
from megatron_xmtf.errors import RecordError
from megatron_xmtf.evaluation.task_file import TaskSettings
from megatron_xmtf.prompts import load_templates, read_rows, render_rows, select_templates, source_from_mapping

__all__ = ["EvaluationExample", "read_examples"]


@dataclass(frozen=True)
class EvaluationExample:
    """One question: its text, its right answer, the answers to choose from."""

    inputs: str
    target: str
    choices: tuple[str, ...]
    """Answers that are ranked; empty where the answer is generated."""
    dataset: str
    language: str
    template: str
    template_language: str
    where: str
    """`file:line`, for messages."""

    @property
    def target_index(self) -> int:
        """Position of the right answer among the choices."""
        return self.choices.index(self.target)

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What one figure is measured over: dataset, language, template, template language."""
        return self.dataset, self.language, self.template, self.template_language


def read_examples(settings: TaskSettings, *, directory: Path) -> list[EvaluationExample]:
    """Read the examples of one task; `limit` counts each language and template by itself.

    Args:    directory: the task file's own, which relative names start from.
    Raises:  MissingError: no such file. RecordError: malformed record, a target that is not among its choices.
    """
    taken: dict[tuple[str, str, str, str], int] = {}
    examples = []
    for where, record in _records(settings, directory):
        example = _example(settings, record, where)
        taken[example.group] = taken.get(example.group, 0) + 1
        if settings.limit is None or taken[example.group] <= settings.limit:
            examples.append(example)
    if not examples:
        raise RecordError(
            f"task {settings.name!r}: {settings.records or settings.source} gives no record to ask; check the file."
        )
    return examples


def _records(settings: TaskSettings, directory: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (`file:line`, record), read as they are or rendered from a source."""
    if settings.records is not None:
        yield from _read_jsonl(directory / settings.records)
        return
    assert settings.source is not None and settings.templates is not None, "the schema requires them"
    source = source_from_mapping(settings.source, directory=directory, where=f"task {settings.name!r}: source")
    templates = load_templates(directory / settings.templates)
    if settings.template is not None:
        templates = select_templates(templates, [settings.template])
    for record in render_rows(read_rows(source), templates, seed=0, language=settings.language):
        yield f"{source.path}, row {record.id}, template {record.template!r}", record.to_json()


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for chunk in read_chunks(path):
        for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RecordError(f"{where} is not UTF-8: byte {error.start} of the line cannot be decoded.") from error
            except json.JSONDecodeError as error:
                raise RecordError(f"{where}:{error.colno} is not valid JSON: {error.msg}.") from error
            except RecursionError as error:
                raise RecordError(f"{where} is nested too deeply to be read.") from error
            if not isinstance(record, dict):
                raise RecordError(f"{where} holds a {type(record).__name__}; a record is an object.")
            yield where, record


def _example(settings: TaskSettings, record: Mapping[str, Any], where: str) -> EvaluationExample:
    """Check one record and name it in the results."""
    inputs, target = _text(record, "inputs", where), _text(record, "targets", where)
    choices: tuple[str, ...] = ()
    if settings.metric == "accuracy":
        choices = _choices(settings, record, where)
        stripped = [choice.strip() for choice in choices]
        if target.strip() not in stripped:
            raise RecordError(
                f"{where}: the target {target!r} is not among its choices {list(choices)}; accuracy ranks the choices, "
                "and the right answer must be one of them (mend the record, or use metric exact_match)."
            )
        target = choices[stripped.index(target.strip())]
    language = settings.language or _name(record, "language", where)
    if not language:
        raise RecordError(f"{where} has no `language`, and task {settings.name!r} names none; give one of them.")
    return EvaluationExample(
        inputs=inputs,
        target=target,
        choices=choices,
        dataset=settings.dataset or _name(record, "dataset", where) or settings.name,
        language=language,
        template=settings.template or _name(record, "template", where),
        template_language=settings.template_language or _name(record, "template_language", where) or language,
        where=where,
    )


def _choices(settings: TaskSettings, record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the choices as they stand, checked: at least two different ones, none empty."""
    choices = settings.choices if settings.choices is not None else record.get("choices")
    if choices is None:
        raise RecordError(
            f"{where} has no `choices`, and task {settings.name!r} names none; metric accuracy ranks choices."
        )
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise RecordError(f"{where}: choices={choices!r}; they must be a list of texts that are not empty.")
    if len({choice.strip() for choice in choices}) < 2:
        raise RecordError(f"{where}: choices={choices!r}; there must be at least two different ones.")
    return tuple(choices)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if key not in record else f"is {value!r}"
        raise RecordError(f"{where}: `{key}` {found}; a record needs `inputs` and `targets`, texts that are not empty.")
    return value


def _name(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"{where}: {key}={value!r}; it must be a text.")
    return value
