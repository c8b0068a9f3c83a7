"""Reduce results over templates and languages, and lay them out for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import NamedTuple

from rich.cells import cell_len

from megatron_xmtf.evaluation.results import TaskResult

__all__ = ["Aggregate", "aggregate_templates", "align_columns", "language_means", "results_table"]


class Aggregate(NamedTuple):
    """One task in one language over its templates."""

    task: str
    dataset: str
    language: str
    metric: str
    median: float
    mean: float
    best: float
    num_templates: int
    chance: float


def aggregate_templates(results: Iterable[TaskResult]) -> list[Aggregate]:
    """Reduce each (task, dataset, language, metric) to median, mean and best of its templates, in first-seen order.

    Source: the median over prompts is what the BLOOMZ and T0 papers report.
    """
    groups: dict[tuple[str, str, str, str], list[TaskResult]] = {}
    for result in results:
        groups.setdefault((result.task, result.dataset, result.language, result.metric), []).append(result)
    return [
        Aggregate(
            *key,
            median=median(result.value for result in group),
            mean=fmean(result.value for result in group),
            best=max(result.value for result in group),
            num_templates=len(group),
            chance=fmean(result.chance for result in group),
        )
        for key, group in groups.items()
    ]


def language_means(results: Iterable[TaskResult]) -> dict[str, float]:
    """Return each language's mean over tasks of the median over templates."""
    values: dict[str, list[float]] = {}
    for entry in aggregate_templates(results):
        values.setdefault(entry.language, []).append(entry.median)
    return {language: fmean(medians) for language, medians in values.items()}


def results_table(results: Sequence[TaskResult]) -> str:
    """Lay out languages x tasks for a terminal: percent, median over templates, with chance under each task.

    language    months_after    topics
    chance              25.0      33.3
    de                  58.3      40.0
    mean                58.3      40.0
    """
    cells: dict[tuple[str, str], list[float]] = {}
    chances: dict[str, list[float]] = {}
    for entry in aggregate_templates(results):
        column = entry.task if entry.metric == "accuracy" else f"{entry.task} ({entry.metric})"
        cells.setdefault((entry.language, column), []).append(100 * entry.median)
        chances.setdefault(column, []).append(100 * entry.chance)
    languages = sorted({language for language, _ in cells})
    rows = [["language", *chances], ["chance", *(_percent(values) for values in chances.values())]]
    rows += [[language, *(_percent(cells.get((language, column), [])) for column in chances)] for language in languages]
    if len(languages) > 1:
        columns = [
            [value for (_, name), values in cells.items() if name == column for value in values] for column in chances
        ]
        rows.append(["mean", *(_percent(values) for values in columns)])
    return align_columns(rows)


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns of a terminal: the first to the left, the others to the right."""
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0] + " " * (widths[0] - cell_len(row[0]))]
        cells += [" " * (width - cell_len(cell)) + cell for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _percent(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}" if values else "-"
