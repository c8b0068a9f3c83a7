"""Draw a data plan as inline SVG: parts of the loss, datasets x languages, lengths, the mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_xmtf.data.packing_index import ComponentStatistics
from megatron_xmtf.planning.lengths import LengthHistogram
from megatron_xmtf.planning.plan_warnings import percent
from megatron_xmtf.report.page import Html, escape
from megatron_xmtf.report.svg import BLUE, GREY, INK, LINE_COLOURS, ORANGE, SOFT, mix, picture, shorten, text, wrap

__all__ = ["Cell", "cell_heatmap", "component_bars", "length_bars", "stacked_bars"]

LEFT, WIDTH = 200.0, 860.0
"""Pixels: of the names on the left, and of a whole picture."""
OTHER_COLOUR = "#b9c0c9"


@dataclass(frozen=True)
class Cell:
    """One cell of a heatmap: its words, its colour from white (0) to blue (1) or orange (-1), and a longer text."""

    words: str
    strength: float
    title: str


def stacked_bars(
    bars: Sequence[tuple[str, Mapping[str, float]]], *, notes: Mapping[str, str], most_parts: int = 6
) -> Html:
    """Draw one bar a label, made of named parts; the largest parts have colours of their own, the rest is "other".

    Args:    bars: (label, fraction of each part). notes: what stands behind a label's bar.
    """
    sums: dict[str, float] = {}
    for _, parts in bars:
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
    named = sorted(sums, key=lambda name: (-sums[name], name))[:most_parts]
    colours = dict(zip(named, LINE_COLOURS, strict=False))
    legend, top = _legend([*colours.items(), *([("other", OTHER_COLOUR)] if len(sums) > len(named) else [])])
    step, right = 24.0, 150.0
    scale = (WIDTH - LEFT - right) / max(max((sum(parts.values()) for _, parts in bars), default=1.0), 1e-9)
    drawn: list[str] = [legend]
    for number, (label, parts) in enumerate(bars):
        y, x = top + number * step, LEFT
        drawn.append(text(LEFT - 10, y + 15, shorten(label, 26), anchor="end", title=label))
        rest = sum(value for name, value in parts.items() if name not in colours)
        for name, value in [*((name, parts.get(name, 0.0)) for name in named), ("other", rest)]:
            if value:
                title = escape(f"{label}, {name}: {percent(value)}")
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y + 3:.1f}" width="{max(value * scale, 0.5):.1f}" height="16" '
                    f'fill="{colours.get(name, OTHER_COLOUR)}"><title>{title}</title></rect>'
                )
                x += value * scale
        drawn.append(text(x + 8, y + 15, f"{percent(sum(parts.values()))}", weight=600))
        drawn.append(text(x + 70, y + 15, notes.get(label, ""), size=12, colour=SOFT))
    return picture(WIDTH, top + step * len(bars) + 8, drawn, label="parts of the loss")


def _legend(entries: Sequence[tuple[str, str]]) -> tuple[Html, float]:
    """Draw coloured squares with names, as many a line as fit; return them and the pixels they take."""
    x, y, parts = LEFT, 4.0, []
    for name, colour in entries if len(entries) > 1 else []:
        words = shorten(name, 26)
        if x > LEFT and x + 24 + 8 * len(words) > WIDTH:
            x, y = LEFT, y + 22
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="13" height="13" rx="2" fill="{colour}"/>')
        parts.append(text(x + 19, y + 11, words, title=name))
        x += 36 + 8 * len(words)
    return Html("".join(parts)), y + 26 if parts else 4.0


def cell_heatmap(
    rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], Cell | None], *, label: str
) -> Html:
    """Draw rows x columns; `cell(row, column)` is None where there is nothing."""
    cell_width = max(62.0, min(120.0, 880.0 / max(len(columns), 1)))
    cell_height = 24.0
    headers = [wrap(column, int(cell_width / 7.0)) for column in columns]
    top = 14.0 + 15 * max((len(lines) for lines in headers), default=1)
    parts: list[str] = []
    for place, (column, lines) in enumerate(zip(columns, headers, strict=True)):
        x = LEFT + (place + 0.5) * cell_width
        for number, line in enumerate(lines):
            y = top - 8 - 15 * (len(lines) - 1 - number)
            parts.append(text(x, y, line, anchor="middle", size=12, weight=600, title=column))
    for number, row in enumerate(rows):
        y = top + number * cell_height
        parts.append(text(LEFT - 10, y + 16, shorten(row, 26), anchor="end", title=row))
        for place, column in enumerate(columns):
            x = LEFT + place * cell_width
            box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_width - 2:.1f}" height="{cell_height - 2:.1f}" rx="3"'
            drawn = cell(row, column)
            if drawn is None:
                parts.append(f'<rect {box} fill="none" stroke="{GREY}"/>')
                continue
            fill = mix("#ffffff", BLUE if drawn.strength >= 0 else ORANGE, abs(drawn.strength))
            colour = "#ffffff" if abs(drawn.strength) > 0.7 else INK
            parts.append(f'<rect {box} fill="{fill}" stroke="{GREY}"/>')
            parts.append(
                text(
                    x + cell_width / 2, y + 16, drawn.words, anchor="middle", size=12, colour=colour, title=drawn.title
                )
            )
    width = max(LEFT + cell_width * len(columns) + 4, 480.0)
    return picture(width, top + cell_height * len(rows) + 6, parts, label=label)


def length_bars(lengths: LengthHistogram) -> Html:
    """Draw the examples drawn (bars) and the records of the data (outlines) by length, each in percent of its own."""
    edges, height, top = lengths["edges"], 220.0, 40.0
    sums = {name: max(sum(lengths[name]), 1) for name in ("records", "examples")}
    parts_of = {
        "records": [count / sums["records"] for count in lengths["records"]],
        "examples": [count / sums["examples"] for count in lengths["examples"]],
    }
    held = [place for place in range(len(edges)) if lengths["records"][place] or lengths["examples"][place]]
    first, last = held[0], held[-1]
    bins = range(first, last + 1)
    left, step = 52.0, (WIDTH - 60.0) / len(bins)
    highest = max(parts_of[name][place] for name in parts_of for place in bins)
    drawn: list[str] = [
        f'<rect x="{left:g}" y="4" width="13" height="13" fill="{BLUE}"/>',
        text(left + 19, 15, "examples that the run reads"),
        f'<rect x="{left + 210:g}" y="4" width="13" height="13" fill="none" stroke="{INK}"/>',
        text(left + 229, 15, "records of the data"),
    ]
    has_longer = last == len(edges) - 1
    if has_longer:
        drawn.append(f'<rect x="{left + 380:g}" y="4" width="13" height="13" fill="none" stroke="{ORANGE}"/>')
        drawn.append(text(left + 399, 15, "longer than a row"))
    for number, place in enumerate(bins):
        x = left + number * step
        is_longer = place == len(edges) - 1
        for name in ("examples", "records"):
            tall = parts_of[name][place] / highest * height
            box = f'x="{x + 2:.1f}" y="{top + height - tall:.1f}" width="{step - 4:.1f}" height="{tall:.1f}"'
            style = f'fill="{BLUE}"'
            if name == "records":
                style = f'fill="none" stroke="{ORANGE if is_longer else INK}"'
            drawn.append(f"<rect {box} {style}/>")
        part = parts_of["records" if is_longer else "examples"][place]
        if part:
            y, words = top + height - part / highest * height - 5, percent(part)
            drawn.append(text(x + step / 2, y, words, anchor="middle", size=11, colour=SOFT))
        edge = f"{edges[place]:,}" + ("+" if is_longer else "")
        drawn.append(text(x + 2, top + height + 16, edge, size=12, colour=SOFT))
    drawn.append(text(left, top + height + 36, "tokens, inputs and targets together: from ...", size=12, colour=SOFT))
    return picture(WIDTH, top + height + 46, drawn, label="examples by length")


def component_bars(components: Sequence[ComponentStatistics]) -> Html:
    """Draw what each part of the mixture is (bar) and was wanted to be (a line across), with what held it."""
    step, right, top = 26.0, 250.0, 30.0
    largest = max(max(part["wanted_share"], part["share"]) for part in components)
    scale = (WIDTH - LEFT - right) / max(largest, 1e-9)
    drawn: list[str] = [
        f'<rect x="{LEFT:g}" y="4" width="13" height="13" fill="{BLUE}"/>',
        text(LEFT + 19, 15, "is"),
        f'<rect x="{LEFT + 60:g}" y="2" width="3" height="17" fill="{INK}"/>',
        text(LEFT + 70, 15, "wanted"),
    ]
    for number, part in enumerate(components):
        y = top + number * step
        wanted, actual = part["wanted_share"] * scale, part["share"] * scale
        drawn.append(text(LEFT - 10, y + 16, _shorten_middle(part["name"], 26), anchor="end", title=part["name"]))
        colour = ORANGE if part["limited_by"] else BLUE
        drawn.append(f'<rect x="{LEFT:g}" y="{y + 4:.1f}" width="{actual:.1f}" height="16" fill="{colour}"/>')
        drawn.append(f'<rect x="{LEFT + wanted - 1.5:.1f}" y="{y + 1:.1f}" width="3" height="22" fill="{INK}"/>')
        held = f", {part['limited_by']}" if part["limited_by"] else ""
        words = f"{percent(part['share'])}, {part['epochs']:,.2f} epochs{held}"
        drawn.append(text(LEFT + max(wanted, actual) + 10, y + 16, words))
    return picture(WIDTH, top + step * len(components) + 8, drawn, label="parts of the mixture, wanted and actual")


def _shorten_middle(name: str, length: int) -> str:
    """Cut the middle out: a component's name begins with its group and ends with its language.

    >>> _shorten_middle("multilingual/topics[sw]", 15)
    'multi…opics[sw]'
    """
    return name if len(name) <= length else f"{name[: length // 3]}…{name[length // 3 + 1 - length :]}"
