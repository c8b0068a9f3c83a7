"""Turn a data plan into a page: key figures, warnings, parts of the loss, datasets x languages, lengths, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_xmtf.planning.data_plan import DataPlan
from megatron_xmtf.planning.plan_warnings import MANY_EPOCHS, percent
from megatron_xmtf.report.page import Html, Page
from megatron_xmtf.report.plan_pictures import Cell, cell_heatmap, component_bars, length_bars, stacked_bars
from megatron_xmtf.report.plan_table import LOSS_UNITS

__all__ = ["data_plan_page"]

MOST_COLUMNS = 14
"""Datasets that a heatmap shows by themselves; the others are summed in its last column."""
MOST_COMPONENTS = 40
"""Components that are drawn; the table has all."""
OTHERS = "other datasets"
GUARD_WORDS = {"duplicates": "duplicates", "near_duplicates": "near duplicates", "contaminated": "in tests"}


def data_plan_page(plan: DataPlan, *, title: str) -> Page:
    """Build the page of a plan.

    Args:    title: the configuration that was planned, as the user named it.
    """
    run, lengths = plan["run"], plan["lengths"]
    page = Page("Data plan", subtitle=f"{title} · {run['steps']:,} steps of {run['rows_per_step']:,.0f} rows")
    page.key_figure(f"{run['examples']:,}", "examples", detail=f"{run['epochs']:,.2f} epochs")
    page.key_figure(_short(run["tokens"]), "tokens", detail=f"{_short(run['tokens_per_step'])} a step")
    page.key_figure(
        _short(run["target_tokens"]), "target tokens", detail=f"{_short(run['target_tokens_per_step'])} a step"
    )
    page.key_figure(
        f"{100 * run['row_fill']['mean_fraction']:.2f} %",
        "of the rows filled",
        detail=f"{run['rows']:,} rows, {run['examples_per_row']:,.1f} examples in each",
    )
    page.key_figure(f"{len(plan['languages']):,}", "languages", detail=f"{len(plan['datasets']):,} datasets")
    if plan["warnings"]:
        page.section("Look at this first", *(warning["message"] for warning in plan["warnings"]))
    page.section("Languages", *_language_parts(plan))
    if len(plan["datasets"]) > 1 and len(plan["languages"]) > 1:
        page.section("Datasets × languages", *_heatmaps(plan))
    if plan["unit"] is not None:
        caption = (
            f"Part of all {plan['unit'].replace('_', ' ')}: bar, what the run reads; line across, what the mixture "
            "asks for. Orange: held by its max_epochs or by a floor."
        )
        largest = sorted(plan["components"], key=lambda part: -max(part["wanted_share"], part["share"]))[
            :MOST_COMPONENTS
        ]
        shown = [part for part in plan["components"] if part in largest]
        more = (
            f" The {len(shown)} largest of {len(plan['components']):,}." if len(shown) < len(plan["components"]) else ""
        )
        page.section("Mixture", Page.figure(component_bars(shown), caption + more))
    caption = (
        f"Median {lengths['median']:,}, mean {lengths['mean']:,.1f}, 95 % up to {lengths['percentile_95']:,}, longest "
        f"{lengths['longest']:,} tokens; a row holds {_room(plan)}."
    )
    page.section("Lengths", Page.figure(length_bars(lengths), caption))
    if plan["guards"]["contamination"]:
        page.section("Texts of evaluation tasks in the data", *_contamination(plan))
    page.section("All figures", *_tables(plan))
    return page


def _room(plan: DataPlan) -> str:
    sides = plan["sides"]
    if sides is None:
        return f"{plan['sequence_length'] + 1:,}"
    return f"{sides['encoder_length']:,} of inputs and {sides['decoder_length']:,} of targets"


def _language_parts(plan: DataPlan) -> list[Html]:
    """Draw each language's part of the loss, made of its datasets."""
    parts: dict[str, dict[str, float]] = {row["language"]: {} for row in plan["languages"]}
    for row in plan["cells"]:
        parts[row["language"]][row["dataset"]] = row["loss_fraction"]
    notes = {row["language"]: f"{row['epochs']:,.2f} epochs" for row in plan["languages"]}
    caption = (
        f"Part of the loss by language, coloured by dataset; {LOSS_UNITS[plan['normalization']]} "
        f"({plan['normalization']}). Epochs: how often the run reads an example on average."
    )
    return [Page.figure(stacked_bars(list(parts.items()), notes=notes), caption)]


def _heatmaps(plan: DataPlan) -> list[Html]:
    languages = [row["language"] for row in plan["languages"]]
    names = [row["dataset"] for row in plan["datasets"]]
    shown = names if len(names) <= MOST_COLUMNS + 1 else names[:MOST_COLUMNS]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in plan["cells"]:
        key = (row["language"], row["dataset"] if row["dataset"] in shown else OTHERS)
        held = cells.setdefault(key, {"loss_fraction": 0.0, "examples": 0, "available": 0, "records": 0})
        for name in held:
            held[name] += row[name]
    columns = [*shown, *([OTHERS] if len(shown) < len(names) else [])]
    largest = max(cell["loss_fraction"] for cell in cells.values()) or 1.0

    def loss(language: str, dataset: str) -> Cell | None:
        cell = cells.get((language, dataset))
        if cell is None:
            return None
        # The square root lets small parts be seen beside large ones.
        strength = 0.85 * math.sqrt(cell["loss_fraction"] / largest)
        title = f"{language}, {dataset}: {percent(cell['loss_fraction'])} of the loss, {cell['examples']:,} examples"
        return Cell(_bare_percent(cell["loss_fraction"]), strength, title)

    def epochs(language: str, dataset: str) -> Cell | None:
        cell = cells.get((language, dataset))
        if cell is None:
            return None
        value = cell["examples"] / cell["available"] if cell["available"] else 0.0
        title = f"{language}, {dataset}: {cell['examples']:,} draws of {cell['available']:,} examples"
        return Cell(f"{value:,.1f}" if value >= 0.95 else f"{value:.2f}", _epoch_strength(value), title)

    return [
        Page.figure(
            cell_heatmap(languages, columns, loss, label="part of the loss by language and dataset"),
            "Part of the loss, percent. Empty: the data has none.",
        ),
        Page.figure(
            cell_heatmap(languages, columns, epochs, label="epochs by language and dataset"),
            f"Epochs. White is none, blue up to {MANY_EPOCHS:g}; orange is beyond, where repeats teach less and less.",
        ),
    ]


def _epoch_strength(epochs: float) -> float:
    """Map epochs to a colour: blue up to MANY_EPOCHS, orange from there to its fourfold."""
    if epochs <= MANY_EPOCHS:
        return 0.6 * epochs / MANY_EPOCHS
    return -min(0.85, 0.3 + 0.55 * math.log(epochs / MANY_EPOCHS) / math.log(4))


def _bare_percent(fraction: float) -> str:
    return percent(fraction).removesuffix(" %")


def _contamination(plan: DataPlan) -> list[Html]:
    """List which task's texts are in which data."""
    names = ["dataset", "language", "task", "evaluation_language", "examples", "exact", "ngram", "found"]
    headers = ["dataset", "language", "task", "its language", "records", "exact", "n-grams", "texts found", "of"]
    parts = sorted(plan["guards"]["contamination"], key=lambda part: -part["examples"])
    rows = [[part[name] for name in [*names, "evaluation_texts"]] for part in parts]
    return [
        Page.table(headers, rows, caption="records that hold a text of the task, and how many of its texts they hold")
    ]


def _tables(plan: DataPlan) -> list[Html]:
    tables: list[tuple[str, Sequence[dict[str, Any]], list[str]]] = [
        ("Datasets", plan["datasets"], ["dataset"]),
        ("Languages", plan["languages"], ["language"]),
        ("Datasets × languages", plan["cells"], ["dataset", "language"]),
        *((f"By {column}", rows, [column]) for column, rows in plan["by"].items()),
        ("Indexed datasets", plan["entries"], ["entry"]),
    ]
    words = ["records", "examples", "tokens", "target tokens", "loss, %", "epochs", "most reads", "cut", "too long"]
    guards = plan["guards"]["checked"]
    drawn = [
        Page.table(
            [*names, *words, "empty", *(GUARD_WORDS[name] for name in guards)],
            [
                [
                    *(row[name] for name in names),
                    row["records"],
                    row["examples"],
                    row["tokens"],
                    row["target_tokens"],
                    round(100 * row["loss_fraction"], 3),
                    round(row["epochs"], 2),
                    row["most_draws"],
                    row["truncated"],
                    row["dropped"],
                    row["empty"],
                    *(row[name] for name in guards),
                ]
                for row in rows
            ],
            caption=title,
        )
        for title, rows, names in tables
    ]
    if plan["unit"] is not None:
        drawn.append(_component_table(plan))
    if plan["objectives"]:
        drawn.append(_objective_table(plan))
    return drawn


def _objective_table(plan: DataPlan) -> Html:
    headers = ["entry", "objective", "documents", "tokens", "chunks", "of at most", "documents cut", "in no example"]
    rows = [
        [
            part["entry"],
            part["objective"],
            part["documents"],
            part["document_tokens"],
            part["chunks"],
            part["chunk_length"],
            part["cut_documents"],
            part["too_short"],
        ]
        for part in plan["objectives"]
    ]
    return Page.table(headers, rows, caption="Documents under their objectives; a chunk is a record above")


def _component_table(plan: DataPlan) -> Html:
    headers = ["component", "dataset", "wanted, %", "is, %", "available", "examples", "epochs", "held by"]
    rows = [
        [
            part["name"],
            part["dataset"],
            round(100 * part["wanted_share"], 3),
            round(100 * part["share"], 3),
            part["available"],
            part["examples"],
            round(part["epochs"], 2),
            part["limited_by"],
        ]
        for part in plan["components"]
    ]
    return Page.table(headers, rows, caption="Components of the mixture")


def _short(value: float) -> str:
    """Word a large count with three digits.

    >>> [_short(value) for value in (950, 12_345, 13_090_000_000)]
    ['950', '12.3 k', '13.1 G']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.3g} {letter}"
    return f"{value:,.0f}"
