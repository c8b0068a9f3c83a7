"""Draw loss curves and before-and-after bars as inline SVG; the language x task picture is in `heatmap`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_xmtf.report.page import Html, format_number
from megatron_xmtf.report.svg import BLUE, GREY, INK, LINE_COLOURS, ORANGE, SOFT, picture, shorten, text, ticks

__all__ = ["Change", "change_bars", "loss_curves"]

SMOOTHED_FROM_POINTS = 60
"""A curve with at least this many points is drawn thin, with its running mean in bold."""

Projection = Callable[[float, float], tuple[float, float]]
"""From a value (x, y) to pixels (across, down)."""


@dataclass(frozen=True)
class Change:
    """One measured figure, a fraction from 0 to 1, before and after training.

    Args:  before: None when it was not measured. after: likewise; with one measurement only, give `after`.
           chance: what guessing gives. stderr: standard error of each of the two, None when unknown.
    """

    before: float | None
    after: float | None
    chance: float
    stderr: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the change is over two standard errors of a difference (sqrt(2) of one measurement's)."""
        if self.before is None or self.after is None or self.stderr is None:
            return False
        return abs(self.after - self.before) > 2 * math.sqrt(2) * self.stderr

    def words(self) -> str:
        """Word it in percent, as `28 → 58`."""
        return " → ".join(f"{100 * value:.0f}" for value in (self.before, self.after) if value is not None) or "–"


def loss_curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str = "step", y_label: str = "loss"
) -> Html:
    """Draw lines through (x, y) points, one line a name; points that are not finite leave a gap.

    Long curves are drawn thin with their running mean in bold; the last value stands at the line's end.
    """
    width, height, left, right, top, bottom = 860.0, 330.0, 56.0, 84.0, 36.0, 44.0
    finite = {name: [(x, y) for x, y in line if math.isfinite(y)] for name, line in series.items()}
    points = [point for line in finite.values() for point in line]
    if not points:
        return picture(width, 60, [text(left, 34, "no finite values to draw", colour=SOFT)], label=y_label)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin
    if x_high == x_low:
        x_high = x_low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    parts = _axes(at, (x_low, x_high), (y_low, y_high), right_edge=width - right)
    parts.append(text((left + width - right) / 2, height - 6, x_label, anchor="middle", colour=SOFT))
    parts.append(text(left, 16, y_label, colour=SOFT))
    legend_x, end_labels = left + 8 * len(y_label) + 16, []
    for number, (name, line) in enumerate(series.items()):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        dash = "" if number < len(LINE_COLOURS) else ' stroke-dasharray="6 4"'
        smooth = len(line) >= SMOOTHED_FROM_POINTS
        parts.append(_line(line, at, colour, dash, width=1.0 if smooth else 2.2, opacity=0.35 if smooth else 1.0))
        if smooth:
            parts.append(_line(_running_mean(line, len(line) // 20), at, colour, dash, width=2.4, opacity=1.0))
        if finite[name]:
            end_labels.append((at(*finite[name][-1])[1], format_number(finite[name][-1][1]), colour))
        if len(series) > 1:
            parts.append(
                f'<line x1="{legend_x:.0f}" x2="{legend_x + 22:.0f}" y1="12" y2="12" stroke="{colour}" '
                f'stroke-width="3"{dash}/>'
            )
            parts.append(text(legend_x + 28, 16, shorten(name, 28), title=name))
            legend_x += 28 + 8 * min(len(name), 28) + 18
    if any(len(line) >= SMOOTHED_FROM_POINTS for line in series.values()):
        words = "thin: measured, bold: running mean"
        parts.append(text(width - right, 16, words, anchor="end", size=12, colour=SOFT))
    below = -1e9
    for y, words, colour in sorted(end_labels):
        below = max(y + 4, below + 14)  # labels of lines that end together are pushed apart
        parts.append(text(width - right + 8, below, words, colour=colour, weight=600))
    return picture(width, height, parts, label=f"{y_label} against {x_label}: {', '.join(series)}")


def change_bars(changes: Sequence[tuple[str, Change]], *, value_label: str = "accuracy, %") -> Html:
    """Draw one line a label on a 0 to 100 % scale: open dot before, full dot after, a short bar at chance."""
    left, width, step, top = 220.0, 860.0, 28.0, 44.0
    scale = width - left - 130.0
    parts: list[str] = []
    bottom = top + step * len(changes)
    for tick in (0, 25, 50, 75, 100):
        x = left + tick / 100 * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6:g}" y2="{bottom:g}" stroke="{GREY}"/>')
        parts.append(text(x, bottom + 18, tick, anchor="middle", size=12, colour=SOFT))
    parts.append(text(left + scale / 2, bottom + 36, value_label, anchor="middle", size=12, colour=SOFT))
    parts.extend(_bar_legend(left, has_before=any(change.before is not None for _, change in changes)))
    for number, (label, change) in enumerate(changes):
        y = top + step * (number + 0.5)
        parts.append(text(left - 14, y + 4, shorten(label, 28), anchor="end", title=label))
        parts.extend(_bar(change, y, left, scale))
        weight = 600 if change.is_significant else 400
        parts.append(text(left + scale + 16, y + 4, f"{change.words()} %", weight=weight))
    return picture(width, bottom + 44, parts, label="before and after, with chance")


def _axes(
    at: Projection, x_range: tuple[float, float], y_range: tuple[float, float], *, right_edge: float
) -> list[str]:
    parts = []
    for y in ticks(*y_range):
        start = at(x_range[0], y)
        parts.append(
            f'<line x1="{start[0]:.1f}" x2="{right_edge:.1f}" y1="{start[1]:.1f}" y2="{start[1]:.1f}" stroke="{GREY}"/>'
        )
        parts.append(text(start[0] - 8, start[1] + 4, f"{y:g}", anchor="end", size=12, colour=SOFT))
    floor = at(x_range[0], y_range[0])[1]
    for x in ticks(*x_range, count=8):
        parts.append(text(at(x, y_range[0])[0], floor + 18, f"{x:,g}", anchor="middle", size=12, colour=SOFT))
    return parts


def _line(
    line: Sequence[tuple[float, float]], at: Projection, colour: str, dash: str, *, width: float, opacity: float
) -> str:
    pen_down, commands = False, []
    for x, y in line:
        if not math.isfinite(y):
            pen_down = False
            continue
        across, down = at(x, y)
        commands.append(f"{'L' if pen_down else 'M'}{across:.1f} {down:.1f}")
        pen_down = True
    return (
        f'<path d="{"".join(commands)}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
        f'stroke-linejoin="round" stroke-linecap="round" opacity="{opacity:g}"{dash}/>'
    )


def _running_mean(line: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Average each point with its `window` neighbours on either side; what is not finite is left out."""
    smooth = []
    for index, (x, _) in enumerate(line):
        near = [y for _, y in line[max(0, index - window) : index + window + 1] if math.isfinite(y)]
        if near:
            smooth.append((x, fmean(near)))
    return smooth


def _bar_legend(left: float, *, has_before: bool) -> list[str]:
    entries = [
        (f'<circle cx="{left + 6:g}" cy="12" r="5" fill="#ffffff" stroke="{SOFT}" stroke-width="2"/>', "before", 0),
        (f'<circle cx="{left + 86:g}" cy="12" r="6" fill="{BLUE}"/>', "after", 80),
        (f'<rect x="{left + 155:g}" y="4" width="3" height="16" fill="{INK}"/>', "chance", 150),
    ]
    shown = entries if has_before else [entries[2]]
    return [part for shape, words, x in shown for part in (shape, text(left + x + 16, 16, words, colour=SOFT))]


def _bar(change: Change, y: float, left: float, scale: float) -> list[str]:
    x_chance = left + change.chance * scale
    parts = [f'<rect x="{x_chance - 1.5:.1f}" y="{y - 9:.1f}" width="3" height="18" fill="{INK}"/>']
    before, after = change.before, change.after
    if before is not None and after is not None:
        colour = BLUE if after >= before else ORANGE
        parts.append(
            f'<line x1="{left + before * scale:.1f}" x2="{left + after * scale:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="4" opacity="0.55"/>'
        )
    if before is not None:
        x = left + before * scale
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#ffffff" stroke="{SOFT}" stroke-width="2"/>')
    if after is not None:
        colour = BLUE if before is None or after >= before else ORANGE
        parts.append(f'<circle cx="{left + after * scale:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>')
    return parts
