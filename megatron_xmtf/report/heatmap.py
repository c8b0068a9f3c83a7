"""Draw languages x tasks, before and after training, as inline SVG."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from megatron_xmtf.report.page import Html
from megatron_xmtf.report.pictures import Change
from megatron_xmtf.report.svg import BLUE, GREY, INK, ORANGE, SOFT, mix, picture, shorten, text, wrap

__all__ = ["language_task_heatmap"]


def language_task_heatmap(
    changes: Mapping[tuple[str, str], Change],
    *,
    languages: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    language_labels: Mapping[str, str] | None = None,
    emphasised: Collection[str] = (),
) -> Html:
    """Draw languages x tasks, each cell `before → after` in percent and coloured by its distance from chance.

        white     after = chance
        blue      above: full at 100 %         orange    below: full at 0 %
        bold      the change is over two standard errors

    Args:    changes: by (language, task); a missing pair is an empty cell. languages, tasks: order of rows and
             columns; default: languages by mean gain over chance, tasks by name.
             language_labels: what to show for a language. emphasised: languages marked "●" (those trained on).
    """
    tasks = list(tasks) if tasks is not None else sorted({task for _, task in changes})
    if languages is None:
        languages = sorted({language for language, _ in changes}, key=lambda row: (-_mean_gain(changes, row), row))
    labels = language_labels or {}
    label_width, cell_height = 200.0, 25.0
    cell_width = max(92.0, min(130.0, 860.0 / (len(tasks) + 1)))
    columns = [*tasks, None] if len(tasks) > 1 else list(tasks)
    rows = [None, *languages] if len(languages) > 1 else list(languages)
    width = max(label_width + len(columns) * cell_width + 4, 660.0)
    header = 72.0 + 15 * max(len(wrap(task, int(cell_width / 8.2))) for task in tasks)
    parts: list[str] = [_scale(label_width, has_bold=any(change.is_significant for change in changes.values()))]
    for column, task in enumerate(columns):
        x = label_width + (column + 0.5) * cell_width
        parts.extend(_column_header(x, header, task, changes, cell_width))
    for row, language in enumerate(rows):
        y = header + row * cell_height + (6 if row and len(rows) > 1 else 0)
        name = f"mean of {len(languages)} languages" if language is None else labels.get(language, language)
        mark = "● " if language in emphasised else ""
        weight = 600 if language is None or mark else 400
        short = mark + shorten(name, 26)
        parts.append(text(label_width - 10, y + 17, short, anchor="end", weight=weight, title=name))
        for column, task in enumerate(columns):
            cells = [
                changes[key]
                for key in ((code, name) for code in languages for name in tasks)
                if key in changes and language in (None, key[0]) and task in (None, key[1])
            ]
            x = label_width + column * cell_width
            parts.append(_heat_cell(x, y, cell_width, cell_height, cells, where=f"{name}, {task or 'all tasks'}"))
    height = header + len(rows) * cell_height + 14
    return picture(width, height, parts, label="accuracy by language and task")


def _gain(change: Change) -> float:
    """Distance from chance: 1 at 100 %, 0 at chance, -1 at 0 %."""
    value = change.after if change.after is not None else change.before
    if value is None:
        return 0.0
    if value >= change.chance:
        return (value - change.chance) / max(1 - change.chance, 1e-9)
    return (value - change.chance) / max(change.chance, 1e-9)


def _mean_gain(changes: Mapping[tuple[str, str], Change], language: str) -> float:
    return fmean(_gain(change) for (code, _), change in changes.items() if code == language)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _heat_cell(x: float, y: float, width: float, height: float, changes: Sequence[Change], *, where: str) -> str:
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" rx="3"'
    if not changes:
        return f'<rect {box} fill="none" stroke="{GREY}"/>'
    gain = fmean(_gain(change) for change in changes)
    fill = mix("#ffffff", BLUE if gain >= 0 else ORANGE, abs(gain))
    colour = "#ffffff" if abs(gain) > 0.85 else INK
    mean = Change(
        _mean([change.before for change in changes]),
        _mean([change.after for change in changes]),
        fmean(change.chance for change in changes),
    )
    weight = 700 if len(changes) == 1 and changes[0].is_significant else 400
    title = f"{where}: {mean.words()} %, chance {100 * mean.chance:.0f} %"
    words = text(x + width / 2, y + 17, mean.words(), anchor="middle", colour=colour, weight=weight, title=title)
    return f'<rect {box} fill="{fill}" stroke="{GREY}"/>{words}'


def _column_header(
    x: float, bottom: float, task: str | None, changes: Mapping[tuple[str, str], Change], width: float
) -> list[str]:
    if task is None:
        return [text(x, bottom - 24, "mean", anchor="middle", weight=600)]
    lines = wrap(task, int(width / 8.2))
    chances = sorted({round(100 * change.chance) for (_, name), change in changes.items() if name == task})
    spread = f"{chances[0]}" if len(chances) == 1 else f"{chances[0]}–{chances[-1]}"
    parts = [
        text(x, bottom - 24 - 15 * (len(lines) - 1 - number), line, anchor="middle", weight=600, title=task)
        for number, line in enumerate(lines)
    ]
    return [*parts, text(x, bottom - 8, f"chance {spread}", anchor="middle", size=12, colour=SOFT)]


def _scale(left: float, *, has_bold: bool) -> Html:
    """Draw the legend of the heat map's colours, and of bold figures where there are any."""
    cell, parts = 26.0, []
    for number in range(9):
        gain = (number - 4) / 4
        fill = mix("#ffffff", BLUE if gain >= 0 else ORANGE, abs(gain))
        parts.append(
            f'<rect x="{left + 56 + number * cell:.1f}" y="2" width="{cell:g}" height="14" fill="{fill}" '
            f'stroke="{GREY}"/>'
        )
    middle = left + 56 + 4.5 * cell
    parts.append(text(left + 50, 13, "0 %", anchor="end", size=12, colour=SOFT))
    parts.append(text(middle, 29, "chance", anchor="middle", size=12, colour=SOFT))
    words = "100 %" + (" · bold: change of over two standard errors" if has_bold else "")
    parts.append(text(left + 62 + 9 * cell, 13, words, size=12, colour=SOFT))
    return Html("".join(parts))
