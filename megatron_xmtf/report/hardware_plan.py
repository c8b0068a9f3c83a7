"""Add a hardware plan to a page: key figures, memory of each stage, the pipeline's schedule, where a step goes."""

from __future__ import annotations

from megatron_xmtf.planning.communication import pipeline_traffic
from megatron_xmtf.planning.hardware_plan import HardwarePlan, layout_mapping
from megatron_xmtf.planning.memory_model import GIB, KINDS
from megatron_xmtf.report.hardware_table import STEP_PARTS, word_layout
from megatron_xmtf.report.memory_picture import memory_picture
from megatron_xmtf.report.page import Html, Page
from megatron_xmtf.report.schedule_picture import schedule_picture, shown_micro_batches

__all__ = ["add_hardware_plan"]


def add_hardware_plan(page: Page, plan: HardwarePlan) -> Page:
    """Add the sections of a plan to a page, and its key figures to the row under the title."""
    cost, time, cluster = plan.cost, plan.time, plan.cluster
    largest = max(stage.total for stage in plan.memory) / GIB
    page.key_figure(
        f"{largest:.1f} GiB",
        "on the fullest GPU",
        detail=f"of {cluster.memory_gib:g}: {'fits' if largest <= cluster.memory_gib else 'does not fit'}",
    )
    page.key_figure(f"{time.seconds:,.2f} s", "a step", detail=f"{cost.tokens_per_second:,.0f} tokens/s")
    page.key_figure(f"{cost.mfu_percent:.1f} %", "MFU", detail=f"{cost.model_tflops_per_gpu:.1f} model TFLOP/s a GPU")
    page.key_figure(f"{cost.hours:,.1f} h", "for the run", detail=f"{cost.gpu_hours:,.0f} GPU hours")
    if plan.warnings:
        page.section(
            "The layout: look at this first",
            *(f"{'Refused: ' if warning['is_refused'] else ''}{warning['message']}" for warning in plan.warnings),
        )
    page.section("Memory of each GPU", *_memory_parts(plan))
    if plan.layout.pp > 1:
        page.section("The pipeline", *_schedule_parts(plan))
    page.section("A step", *_step_parts(plan))
    if plan.search is not None:
        page.section("Other layouts", *_search_parts(plan))
    return page


def _memory_parts(plan: HardwarePlan) -> list[Html | str]:
    picture = memory_picture(plan.memory, limit_gib=plan.cluster.memory_gib)
    choices = ", ".join(f"{name} {size:.1f}" for name, size in plan.by_recompute.items())
    caption = (
        f"One bar a pipeline stage, {word_layout(plan)}. Dashed: what a GPU of {plan.cluster.name} has. The fullest "
        f"GPU by what is recomputed, GiB: {choices}. Framework: context, NCCL, what the allocator cannot reuse."
    )
    rows = [
        [
            stage.stage,
            stage.layers,
            stage.in_flight,
            stage.parameters,
            *(round(getattr(stage, kind) / GIB, 3) for kind in KINDS),
            round(stage.total / GIB, 3),
        ]
        for stage in plan.memory
    ]
    table = Page.table(
        ["stage", "layers", "in flight", "parameters", *KINDS, "together"],
        rows,
        caption="GiB of one GPU of each stage; in flight: micro-batches (chunks of them) whose activations are held",
    )
    return [Page.figure(picture, caption), table]


def _schedule_parts(plan: HardwarePlan) -> list[Html | str]:
    layout = plan.layout
    shown = shown_micro_batches(layout.micro_batches, layout.pp, layout.vpp)
    seconds = pipeline_traffic(plan.architecture, layout, plan.cluster, border=None).seconds
    picture = schedule_picture(plan.time.chunks, micro_batches=shown, hand_over=seconds)
    name = "Interleaved 1F1B" if layout.vpp > 1 else "1F1B"
    of_all = f"{shown} of a step's {layout.micro_batches:,}" if shown < layout.micro_batches else f"All {shown}"
    rows = "" if layout.pp <= 16 else f" Every few of {layout.pp} stages."
    caption = (
        f"{name}. {of_all} micro-batches; a step begins and ends so, and repeats its middle.{rows} In the whole step "
        f"the pipeline fills and drains for {plan.time.bubble:.2f} s, {100 * plan.time.bubble_fraction:.1f} % of it."
    )
    return [Page.figure(picture, caption)]


def _step_parts(plan: HardwarePlan) -> list[Html | str]:
    time = plan.time
    parts = [
        [words, round(getattr(time, name), 4), round(100 * getattr(time, name) / time.seconds, 2)]
        for name, words in STEP_PARTS.items()
    ]
    traffic = [[name, round(sent.gigabytes, 3), round(sent.seconds, 4)] for name, sent in time.sent.items()]
    cost = plan.cost
    return [
        Page.table(["part", "seconds", "percent"], parts, caption="a step of the slowest stage, by what it waits for"),
        Page.table(
            ["sent by a GPU", "GB", "seconds"], traffic, caption="a step; what overlaps with computing included"
        ),
        f"{cost.checkpoint_gb:,.1f} GB a checkpoint take {cost.save_seconds:,.1f} s; to save every "
        f"{cost.save_interval_minutes:,.0f} minutes ({cost.save_interval_steps:,} steps) loses least time to saves and "
        "to failures together (Young, Daly).",
    ]


def _search_parts(plan: HardwarePlan) -> list[Html | str]:
    search = plan.search
    assert search is not None, "the caller has looked"
    if not search.best:
        return [f"None of {search.tried:,} layouts fits; {search.nearest}."]
    rows = [
        [
            candidate.layout.words,
            round(candidate.time.seconds, 3),
            round(plan.cost.mfu_percent * plan.time.seconds / candidate.time.seconds, 2),
            round(candidate.largest_gib, 2),
            candidate.reason,
            " ".join(layout_mapping(candidate.layout)["overrides"]),
        ]
        for candidate in search.best
    ]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in search.rejected.items())
    caption = f"fastest of {search.tried:,} layouts that use all GPUs; left out: {rejected or 'none'}"
    return [Page.table(["layout", "s a step", "MFU, %", "GiB", "why", "overrides"], rows, caption=caption)]
