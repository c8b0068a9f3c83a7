"""Draw with inline SVG: colours, text, ticks. Text is drawn by the browser, so any script can be shown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from megatron_xmtf.report.page import Html, escape

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "LINE_COLOURS",
    "ORANGE",
    "SOFT",
    "mix",
    "picture",
    "shorten",
    "text",
    "ticks",
    "wrap",
]

INK, SOFT, GREY = "#1d2430", "#5c6675", "#dfe3e8"
BLUE, ORANGE = "#0072b2", "#d55e00"
LINE_COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2430")
"""Colours that people with any colour blindness tell apart. Source: Okabe and Ito, 2008."""

FONT = "font-family: inherit; font-variant-numeric: tabular-nums"


def picture(width: float, height: float, parts: Iterable[str], *, label: str) -> Html:
    """Frame drawn parts as an SVG of width x height pixels; `label` is what a screen reader says."""
    return Html(
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" style="{FONT}">' + "".join(parts) + "</svg>"
    )


def text(
    x: float,
    y: float,
    content: object,
    *,
    size: float = 13,
    anchor: str = "start",
    colour: str = INK,
    weight: int = 400,
    title: str = "",
) -> Html:
    """Draw text with its baseline at y; `anchor` is start, middle or end; `title` shows on hovering."""
    hover = f"<title>{escape(title)}</title>" if title else ""
    return Html(
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{hover}{escape(content)}</text>'
    )


def shorten(label: str, length: int) -> str:
    """Cut a label to `length` characters, the last an ellipsis (drawn with the whole one as its title)."""
    return label if len(label) <= length else label[: length - 1].rstrip() + "…"


def wrap(label: str, length: int) -> list[str]:
    """Break a name at `_`, `-`, `/` and spaces into at most three lines.

    >>> wrap("paraphrase_identification", 14)
    ['paraphrase_', 'identification']
    """
    lines = [""]
    for part in re.findall(r"[^\s_/-]+[\s_/-]*", label) or [label]:
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > length:
            lines.append("")
        lines[-1] += part
    kept = lines[:3] if len(lines) <= 3 else [*lines[:2], "".join(lines[2:])]
    return [shorten(line.strip(), length) for line in kept]


def mix(start: str, end: str, amount: float) -> str:
    """Return the colour `amount` (0 to 1) of the way from `start` to `end`.

    >>> mix("#ffffff", "#000000", 0.5)
    '#808080'
    """
    amount = min(max(amount, 0.0), 1.0)
    channels = [(int(start[i : i + 2], 16), int(end[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(first + (last - first) * amount):02x}" for first, last in channels)


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, about `count` of them, at steps of 1, 2 or 5 x 10^n.

    >>> ticks(0, 37)
    [0.0, 10.0, 20.0, 30.0]
    """
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
