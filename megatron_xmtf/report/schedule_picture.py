"""Draw a pipeline's schedule: stages down, time across, forward and backward passes, bubbles left grey."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_xmtf.planning.chunk_time import ChunkTime
from megatron_xmtf.planning.pipeline_schedule import Pass, makespan, simulate
from megatron_xmtf.report.page import Html, escape
from megatron_xmtf.report.svg import BLUE, GREY, INK, ORANGE, SOFT, mix, picture, text, ticks

__all__ = ["schedule_picture", "shown_micro_batches"]

LEFT, WIDTH = 80.0, 860.0
MOST_ROWS = 16
"""Stages that are drawn; of a deeper pipeline every n-th, the last among them."""
MOST_MICRO_BATCHES = 96


def shown_micro_batches(micro_batches: int, stages: int, chunks: int) -> int:
    """Return how many micro-batches are drawn: enough to fill and drain the pipeline, whole groups of stages.

    >>> shown_micro_batches(128, 12, 1), shown_micro_batches(512, 72, 1), shown_micro_batches(4, 8, 1)
    (24, 96, 4)
    """
    shown = min(micro_batches, max(8, 2 * stages), max(stages, MOST_MICRO_BATCHES))
    return shown if chunks == 1 else max(stages, shown // stages * stages)


def schedule_picture(chunks: Sequence[Sequence[ChunkTime]], *, micro_batches: int, hand_over: float) -> Html:
    """Draw one step with some micro-batches, in the times that the plan has.

    Args:    chunks: times of each stage's chunks. micro_batches: how many are drawn. hand_over: seconds from one stage
             to the next.
    """
    times = [[(chunk.forward, chunk.seconds - chunk.pipeline - chunk.forward) for chunk in stage] for stage in chunks]
    passes = simulate(times, micro_batches=micro_batches, hand_over=hand_over)
    stages, end = len(times), makespan(passes)
    rows = _rows(stages)
    height, top = max(14.0, min(26.0, 320.0 / len(rows))), 34.0
    scale = (WIDTH - LEFT - 10) / end
    bottom = top + height * len(rows)
    drawn = _legend(len(times[0]))
    for row, stage in enumerate(rows):
        y = top + row * height
        drawn.append(text(LEFT - 10, y + height / 2 + 4, f"stage {stage}", anchor="end", size=12))
        box = f'x="{LEFT:g}" y="{y + 1:.1f}" width="{end * scale:.1f}" height="{height - 2:.1f}"'
        drawn.append(Html(f'<rect {box} fill="{GREY}"/>'))
    place = {stage: row for row, stage in enumerate(rows)}
    drawn += [
        _rectangle(one, top + place[one.stage] * height, height, scale, len(times[0]))
        for one in passes
        if one.stage in place
    ]
    for tick in ticks(0.0, end, count=8):
        drawn.append(text(LEFT + tick * scale, bottom + 16, f"{tick:g} s", anchor="middle", size=12, colour=SOFT))
    return picture(WIDTH, bottom + 24, drawn, label=f"schedule of {micro_batches} micro-batches on {stages} stages")


def _rows(stages: int) -> list[int]:
    """Return the stages that are drawn: 0, and every n-th to the last."""
    if stages <= MOST_ROWS:
        return list(range(stages))
    return sorted({round(row * (stages - 1) / (MOST_ROWS - 1)) for row in range(MOST_ROWS)})


def _colour(one: Pass, chunks: int) -> str:
    """Return blue forward, orange backward, paler in later chunks."""
    base = BLUE if one.is_forward else ORANGE
    return mix(base, "#ffffff", 0.55 * one.chunk / max(chunks - 1, 1)) if chunks > 1 else base


def _rectangle(one: Pass, y: float, height: float, scale: float, chunks: int) -> Html:
    width = max((one.end - one.start) * scale, 0.4)
    gap = 0.6 if width > 3 else 0.0
    hover = ""
    if width >= 2:
        kind = "forward" if one.is_forward else "backward"
        chunk = f", chunk {one.chunk}" if chunks > 1 else ""
        words = f"micro-batch {one.micro_batch}{chunk}, {kind}: {one.start:.3f} to {one.end:.3f} s"
        hover = f"<title>{escape(words)}</title>"
    box = (
        f'<rect x="{LEFT + one.start * scale:.1f}" y="{y + 1:.1f}" width="{width - gap:.1f}" '
        f'height="{height - 2:.1f}" fill="{_colour(one, chunks)}">{hover}</rect>'
    )
    if width < 16:
        return Html(box)
    middle = LEFT + (one.start + one.end) / 2 * scale
    number = text(middle, y + height / 2 + 4, one.micro_batch, anchor="middle", size=11, colour="#ffffff")
    return Html(box + number)


def _legend(chunks: int) -> list[Html]:
    parts: list[Html] = []
    x = LEFT
    for colour, words in ((BLUE, "forward"), (ORANGE, "backward, with what is recomputed"), (GREY, "bubble")):
        parts.append(Html(f'<rect x="{x:g}" y="4" width="13" height="13" rx="2" fill="{colour}"/>'))
        parts.append(text(x + 19, 15, words, colour=INK))
        x += 40 + 7.2 * len(words)
    if chunks > 1:
        parts.append(text(x, 15, "paler: later chunks", colour=SOFT))
    return parts
