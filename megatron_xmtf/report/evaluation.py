"""Turn evaluation results into a page: key figures, the language x task picture, one row a figure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from megatron_xmtf.evaluation.aggregate import aggregate_templates
from megatron_xmtf.evaluation.results import EvaluatedModel, TaskResult
from megatron_xmtf.report.heatmap import language_task_heatmap
from megatron_xmtf.report.page import Html, Page
from megatron_xmtf.report.pictures import Change, change_bars

__all__ = ["changes_by_language_and_task", "evaluation_page", "language_task_section"]


def changes_by_language_and_task(
    after: Sequence[TaskResult], before: Sequence[TaskResult] = ()
) -> dict[tuple[str, str], Change]:
    """Pair results by (language, task): median over templates, mean over datasets of one name.

    Args:    after: results to be shown. before: of the same tasks before training, if there are any.
    """
    measured = [_by_language_and_task(results) for results in (before, after)]
    changes = {}
    for key in {**measured[1], **measured[0]}:
        earlier, later = measured[0].get(key), measured[1].get(key)
        known = later or earlier
        assert known is not None, "the key comes from one of the two"
        changes[key] = Change(
            before=earlier[0] if earlier else None,
            after=later[0] if later else None,
            chance=known[1],
            stderr=known[2],
        )
    return changes


def language_task_section(
    after: Sequence[TaskResult],
    before: Sequence[TaskResult] = (),
    *,
    language_labels: Mapping[str, str] | None = None,
    emphasised: Collection[str] = (),
    several_templates: bool = True,
) -> list[Html]:
    """Draw the parts of a section: languages x tasks, then each task's mean over languages.

    Args:    several_templates: each template is a result of its own, and their median is shown; say so.
    """
    changes = changes_by_language_and_task(after, before)
    tasks = list(dict.fromkeys(task for _, task in changes))
    words = ", before → after" if before else ""
    marked = " ● marks the languages that were trained on." if emphasised else ""
    heatmap = language_task_heatmap(changes, tasks=tasks, language_labels=language_labels, emphasised=emphasised)
    parts = [
        Page.figure(
            heatmap,
            f"Percent right{words}; colour is the distance from chance: white is chance, full blue is 100 %."
            f"{marked}{' Median over templates.' if several_templates else ''}",
        )
    ]
    if len(tasks) > 1 or before:
        bars = [(task, _mean([change for (_, name), change in changes.items() if name == task])) for task in tasks]
        parts.append(Page.figure(change_bars(bars), "Each task, mean over its languages."))
    return parts


def evaluation_page(
    model: EvaluatedModel, results: Sequence[TaskResult], *, language_labels: Mapping[str, str] | None = None
) -> Page:
    """Build the page of one evaluation.

    Args:    results: at least one. language_labels: what to show for a language code.
    """
    step = f"step {model.step:,}" if model.step is not None else "Hugging Face directory"
    page = Page("Evaluation", subtitle=f"{model.model} · {step}")
    values = [entry.median for entry in aggregate_templates(results)]
    chances = [entry.chance for entry in aggregate_templates(results)]
    page.key_figure(
        f"{100 * fmean(values):.1f} %", "mean over tasks and languages", detail=f"chance {100 * fmean(chances):.1f} %"
    )
    page.key_figure(str(len({result.language for result in results})), "languages")
    page.key_figure(str(len({result.task for result in results})), "tasks")
    page.key_figure(f"{sum(result.n for result in results):,}", "questions", detail="examples × templates")
    page.section("Languages × tasks", *language_task_section(results, language_labels=language_labels))
    truncated = sum(result.num_truncated for result in results)
    remarks = [f"{truncated:,} inputs lost tokens on the left to fit the model."] if truncated else []
    page.section("All figures", *remarks, results_html(results))
    return page


def results_html(results: Sequence[TaskResult]) -> Html:
    """List every figure in a table, in percent."""
    headers = ["task", "dataset", "language", "template", "metric", "value, %", "± stderr", "chance, %", "majority, %"]
    rows = [
        [
            result.task,
            result.dataset,
            result.language,
            _template(result),
            result.metric if result.normalization == "none" else f"{result.metric} / {result.normalization}",
            round(100 * result.value, 1),
            None if result.stderr is None else round(100 * result.stderr, 1),
            round(100 * result.chance, 1),
            round(100 * result.majority, 1),
            result.n,
        ]
        for result in results
    ]
    return Page.table([*headers, "n"], rows)


def _template(result: TaskResult) -> str:
    if not result.template or result.template_language in ("", result.language):
        return result.template
    return f"{result.template} ({result.template_language})"


def _by_language_and_task(results: Sequence[TaskResult]) -> dict[tuple[str, str], tuple[float, float, float | None]]:
    """Return value, chance and standard error of each (language, task)."""
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in aggregate_templates(results):
        values.setdefault((entry.language, entry.task), []).append((entry.median, entry.chance))
    errors: dict[tuple[str, str], list[float | None]] = {}
    for result in results:
        errors.setdefault((result.language, result.task), []).append(result.stderr)
    found = {}
    for key, pairs in values.items():
        known = [error for error in errors[key] if error is not None]
        # Templates ask the same examples, so their errors do not average out: the mean error is the cautious one.
        stderr = fmean(known) if known else None
        found[key] = (fmean(value for value, _ in pairs), fmean(chance for _, chance in pairs), stderr)
    return found


def _mean(changes: Sequence[Change]) -> Change:
    before = [change.before for change in changes if change.before is not None]
    after = [change.after for change in changes if change.after is not None]
    return Change(
        before=fmean(before) if before else None,
        after=fmean(after) if after else None,
        chance=fmean(change.chance for change in changes),
    )
