"""Draw what a GPU of each stage holds: one bar a stage, by kind, with the end of its memory as a line."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_xmtf.planning.memory_model import GIB, KINDS, StageMemory
from megatron_xmtf.report.page import Html, escape
from megatron_xmtf.report.svg import GREY, INK, LINE_COLOURS, ORANGE, SOFT, picture, text, ticks

__all__ = ["memory_picture"]

LEFT, WIDTH, RIGHT = 80.0, 860.0, 90.0
COLOURS = dict(zip(KINDS, (*LINE_COLOURS[:1], "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#b9c0c9"), strict=True))


def memory_picture(memory: Sequence[StageMemory], *, limit_gib: float) -> Html:
    """Draw bars from 0 to the fullest stage or the end of memory; bars beyond it end in orange figures."""
    step = max(9.0, min(26.0, 560.0 / len(memory)))
    top = 34.0
    most = max(limit_gib, *(stage.total / GIB for stage in memory)) * 1.03
    scale = (WIDTH - LEFT - RIGHT) / most
    bottom = top + step * len(memory)
    drawn = _legend()
    for tick in ticks(0.0, most, count=6):
        x = LEFT + tick * scale
        drawn.append(Html(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:.1f}" stroke="{GREY}"/>'))
        drawn.append(text(x, bottom + 16, f"{tick:g}", anchor="middle", size=12, colour=SOFT))
    drawn.append(text(WIDTH - RIGHT + 8, bottom + 16, "GiB a GPU", size=12, colour=SOFT))
    labelled = max(1, round(15 / step))
    for number, stage in enumerate(memory):
        y, x = top + number * step, LEFT
        last = len(memory) - 1
        is_labelled = number == last or number % labelled == 0 and last - number >= labelled
        if is_labelled:
            drawn.append(text(LEFT - 10, y + step / 2 + 4, f"stage {stage.stage}", anchor="end", size=12))
        for kind in KINDS:
            size = getattr(stage, kind) / GIB
            if size:
                title = escape(f"stage {stage.stage}, {kind}: {size:.2f} GiB")
                drawn.append(
                    Html(
                        f'<rect x="{x:.1f}" y="{y + 1:.1f}" width="{max(size * scale, 0.3):.1f}" '
                        f'height="{step - 2:.1f}" fill="{COLOURS[kind]}"><title>{title}</title></rect>'
                    )
                )
                x += size * scale
        if is_labelled:
            total = stage.total / GIB
            colour, weight = (ORANGE, 600) if total > limit_gib else (INK, 400)
            drawn.append(
                text(max(x, LEFT) + 6, y + step / 2 + 4, f"{total:.1f}", size=12, colour=colour, weight=weight)
            )
    end = LEFT + limit_gib * scale
    drawn.append(
        Html(
            f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{top - 6:g}" y2="{bottom + 2:.1f}" stroke="{INK}" '
            'stroke-width="2" stroke-dasharray="5 3"/>'
        )
    )
    drawn.append(text(end, top - 10, f"{limit_gib:g} GiB", anchor="middle", size=12, weight=600))
    return picture(WIDTH, bottom + 24, drawn, label="memory of a GPU by pipeline stage and kind")


def _legend() -> list[Html]:
    parts: list[Html] = []
    x = LEFT
    for kind, colour in COLOURS.items():
        parts.append(Html(f'<rect x="{x:.0f}" y="2" width="12" height="12" rx="2" fill="{colour}"/>'))
        parts.append(text(x + 17, 12, kind, size=12))
        x += 34 + 7 * len(kind)
    return parts
