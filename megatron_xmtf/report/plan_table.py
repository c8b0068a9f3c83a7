"""Word a data plan for a terminal: totals, tables by dataset and language, warnings last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import combining, east_asian_width

from megatron_xmtf.planning.data_plan import DataPlan
from megatron_xmtf.planning.tally import UNKNOWN

__all__ = ["fold_rows", "word_data_plan"]

SHOWN = {"entry": 20, "dataset": 20, "language": 24, "cell": 16, "component": 20}
"""Lines of a table before the smaller ones are folded into one; further columns as cells."""
LOSS_UNITS = {
    "target_token": "each target token weighs the same",
    "target_sequence": "each target weighs the same, however long",
    "target_sequence_per_micro_batch": "each micro-batch weighs the same, and in it each target",
    "dataset": "each dataset of a step weighs the same, and in it each target token",
}
NAME_WIDTH = 36


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[dict[str, Any]], str]
    is_needed: Callable[[dict[str, Any]], bool] = lambda row: True
    """A column that no line needs is left out."""


COLUMNS = [
    _Column("records", lambda row: f"{row['records']:,}"),
    _Column("selected", lambda row: f"{row['selected']:,}", lambda row: row["selected"] != row["records"]),
    _Column("examples", lambda row: f"{row['examples']:,}"),
    _Column("tokens", lambda row: f"{row['tokens']:,}"),
    _Column("targets", lambda row: f"{row['target_tokens']:,}"),
    _Column("loss", lambda row: _percent_cell(row["loss_fraction"])),
    _Column("epochs", lambda row: f"{row['epochs']:,.2f}"),
    _Column("most", lambda row: f"{row['most_draws']:,}"),
    _Column("cut", lambda row: f"{row['truncated']:,}", lambda row: bool(row["truncated"])),
    _Column("too long", lambda row: f"{row['dropped']:,}", lambda row: bool(row["dropped"])),
    _Column("empty", lambda row: f"{row['empty']:,}", lambda row: bool(row["empty"])),
    _Column("duplicate", lambda row: f"{row['duplicates']:,}", lambda row: "duplicates" in row),
    _Column("near dup.", lambda row: f"{row['near_duplicates']:,}", lambda row: "near_duplicates" in row),
    _Column("in tests", lambda row: f"{row['contaminated']:,}", lambda row: "contaminated" in row),
]


def word_data_plan(plan: DataPlan, *, fold: bool = True) -> str:
    """Word a plan.

    Args:    fold: sum the smaller lines of a long table in one; False shows all.
    """
    parts = [_word_run(plan)]
    tables: list[tuple[str, Sequence[dict[str, Any]], Sequence[str], int]] = [
        ("datasets", plan["datasets"], ["dataset"], SHOWN["dataset"]),
        ("languages", plan["languages"], ["language"], SHOWN["language"]),
        ("datasets x languages", plan["cells"], ["dataset", "language"], SHOWN["cell"]),
        *((f"by {column}", rows, [column], SHOWN["cell"]) for column, rows in plan["by"].items()),
    ]
    if [row["entry"] for row in plan["entries"]] != [row["dataset"] for row in plan["datasets"]]:
        tables.insert(0, ("indexed datasets", plan["entries"], ["entry"], SHOWN["entry"]))
    for title, rows, names, shown in tables:
        if title == "datasets x languages" and 1 in (len(plan["datasets"]), len(plan["languages"])):
            continue
        parts.append(_word_table(title, fold_rows(rows, names, shown) if fold else rows, names))
    if plan["unit"] is not None:
        parts.append(_word_components(plan, fold=fold))
    if plan["objectives"]:
        parts.append(_word_objectives(plan))
    if plan["guards"]["contamination"]:
        parts.append(_word_contamination(plan))
    if plan["validation"]:
        parts.append(_word_validation(plan))
    parts.append(_word_columns(plan))
    if plan["warnings"]:
        parts.append("\n".join(f"! {warning['message']}" for warning in plan["warnings"]))
    return "\n\n".join(parts)


def _word_columns(plan: DataPlan) -> str:
    """Explain the columns whose titles do not."""
    checked = "contaminated" in plan["guards"]["checked"]
    return (
        "loss: part of the run's loss; epochs: how often an example is read on average; most: how often at most"
        + ("; in tests: records that hold a text of an evaluation task" if checked else "")
        + "."
    )


def _word_run(plan: DataPlan) -> str:
    run, lengths, fill = plan["run"], plan["lengths"], plan["run"]["row_fill"]
    warmup = f", {run['warmup_steps']:,} of them warm-up" if run["warmup_steps"] else ""
    too_long = plan["lengths"]["records"][-1]
    longer = f"; {too_long:,} records are longer than a row" if too_long else ""
    lines = [
        ("run", f"{run['steps']:,} steps{warmup}; {run['rows']:,} rows of {plan['sequence_length']:,} tokens"),
        (
            "reads",
            f"{run['examples']:,} examples ({run['epochs']:,.2f} epochs), {run['tokens']:,} tokens, "
            f"{run['target_tokens']:,} of them targets",
        ),
        (
            "a step",
            f"{run['rows_per_step']:,.0f} rows, {run['examples_per_step']:,.0f} examples, "
            f"{run['tokens_per_step']:,.0f} tokens, {run['target_tokens_per_step']:,.0f} targets",
        ),
        (
            "rows",
            f"{100 * fill['mean_fraction']:.2f} % filled, 99 % of them at least "
            f"{100 * fill['percentile_1_fraction']:.1f} %; {run['examples_per_row']:,.1f} examples in a row",
        ),
        *_word_sides(plan),
        (
            "lengths",
            f"median {lengths['median']:,}, mean {lengths['mean']:,.1f}, 95 % up to {lengths['percentile_95']:,}, "
            f"longest {lengths['longest']:,} tokens{longer}",
        ),
        ("", _word_histogram(lengths["edges"], lengths["examples"])),
        ("loss", f"{LOSS_UNITS[plan['normalization']]} ({plan['normalization']})"),
        ("guards", _word_guards(plan)),
        ("index", plan["index"]),
    ]
    return "\n".join(f"{name:<9}{words}" for name, words in lines)


def _word_sides(plan: DataPlan) -> list[tuple[str, str]]:
    sides = plan["sides"]
    if sides is None:
        return []
    return [
        (
            "sides",
            f"encoder {100 * sides['encoder_fill_fraction']:.2f} % of {sides['encoder_length']:,} tokens, decoder "
            f"{100 * sides['decoder_fill_fraction']:.2f} % of {sides['decoder_length']:,}; no packing of these "
            f"examples has fewer than {sides['fewest_rows']:,} rows",
        )
    ]


def _word_guards(plan: DataPlan) -> str:
    """Say of each guard what it does, or why it could not."""
    states = {"off": "not looked for", "report": "counted, and read all the same", "drop": "counted, and not read"}
    by_state: dict[str, list[str]] = {}
    for name, action in plan["guards"]["settings"].items():
        reason = plan["guards"]["not_checked"].get(name)
        state = f"not checked ({reason})" if reason else states[action]
        by_state.setdefault(state, []).append(name.replace("_", " "))
    return "; ".join(f"{', '.join(names)} {state}" for state, names in by_state.items())


def _word_contamination(plan: DataPlan) -> str:
    """List which task's texts are in which data."""
    names = ("dataset", "language", "task", "evaluation_language")
    header = ["dataset", "language", "task", "its language", "records", "exact", "n-grams", "texts found", "of"]
    parts = sorted(plan["guards"]["contamination"], key=lambda part: -part["examples"])
    lines = [
        [
            *(_shorten(part[name] or UNKNOWN) for name in names),
            *(f"{part[name]:,}" for name in ("examples", "exact", "ngram", "found", "evaluation_texts")),
        ]
        for part in parts[: SHOWN["component"]]
    ]
    left_out = f"\n... {len(parts) - len(lines):,} more" if len(parts) > len(lines) else ""
    return f"texts of evaluation tasks in the data\n{align([header, *lines], left=4)}{left_out}"


def _word_histogram(edges: Sequence[int], counts: Sequence[int]) -> str:
    """Draw one block a bin, `1 ▁▂▅█▃▁ 2,048`, from the first that holds anything to the last."""
    held = [place for place, count in enumerate(counts) if count]
    first, last = held[0], held[-1]
    blocks = "▁▂▃▄▅▆▇█"
    top = max(counts)
    bars = "".join(blocks[min(7, 8 * count // top)] if count else " " for count in counts[first : last + 1])
    end = edges[last + 1] - 1 if last + 1 < len(edges) else edges[last]
    return f"{edges[first]:,} {bars} {end:,} tokens"


def fold_rows(rows: Sequence[dict[str, Any]], names: Sequence[str], shown: int) -> list[dict[str, Any]]:
    """Keep the first lines and sum the rest in one, where at least two would go.

    >>> row = {"records": 1, "most_draws": 2, "examples": 4, "available": 1, "epochs": 4.0}
    >>> fold_rows([{"dataset": "a", **row}, {"dataset": "b", **row}, {"dataset": "c", **row}], ["dataset"], 1)[1]
    {'dataset': '... 2 more', 'records': 2, 'most_draws': 2, 'examples': 8, 'available': 2, 'epochs': 4.0}
    """
    if len(rows) <= shown + 1:
        return list(rows)
    rest = rows[shown:]
    folded: dict[str, Any] = {name: "" for name in names}
    folded[names[0]] = f"... {len(rest):,} more"
    for field in rest[0]:
        if field not in names:
            values = [row[field] for row in rest]
            folded[field] = max(values) if field == "most_draws" else sum(values)
    folded["epochs"] = folded["examples"] / folded["available"] if folded["available"] else 0.0
    return [*rows[:shown], folded]


def _word_table(title: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    columns = [column for column in COLUMNS if any(column.is_needed(row) for row in rows)]
    cells = [[*names, *(column.title for column in columns)]]
    cells += [[*(_shorten(row[name]) for name in names), *(column.cell(row) for column in columns)] for row in rows]
    heading = title if rows[-1][names[0]].startswith("... ") else f"{title} ({len(rows):,})"
    return f"{heading}\n{align(cells, left=len(names))}"


def align(cells: Sequence[Sequence[str]], *, left: int) -> str:
    """Lay out lines of cells in columns: the first `left` columns to the left, the others to the right.

    >>> align([["name", "n"], ["x", "10"]], left=1).splitlines()
    ['name   n', 'x     10']
    """
    widths = [max(display_width(line[place]) for line in cells) for place in range(len(cells[0]))]
    lines = []
    for line in cells:
        space = [" " * (width - display_width(cell)) for cell, width in zip(line, widths, strict=True)]
        padded = [cell + space[place] if place < left else space[place] + cell for place, cell in enumerate(line)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _word_components(plan: DataPlan, *, fold: bool) -> str:
    parts = plan["components"]
    if fold and len(parts) > SHOWN["component"] + 1:
        # Those that are furthest from what was wanted say most.
        by_distance = sorted(parts, key=lambda part: (-abs(part["share"] - part["wanted_share"]), part["name"]))
        kept = {part["name"] for part in by_distance[: SHOWN["component"]]}
        parts = [part for part in parts if part["name"] in kept]
    lines = [["component", "wanted", "is", "available", "examples", "epochs", "held by"]]
    lines += [
        [
            _shorten(part["name"]),
            _percent_cell(part["wanted_share"]),
            _percent_cell(part["share"]),
            f"{part['available']:,}",
            f"{part['examples']:,}",
            f"{part['epochs']:,.2f}",
            part["limited_by"] or "",
        ]
        for part in parts
    ]
    left_out = len(plan["components"]) - len(parts)
    more = f"\n... {left_out:,} more, nearer to what was wanted" if left_out else ""
    unit = (plan["unit"] or "examples").replace("_", " ")
    return f"mixture, parts of all {unit}\n{align(lines, left=1)}{more}"


def _word_objectives(plan: DataPlan) -> str:
    """Say what became of plain documents; tokens in no example are those of documents of a single token."""
    header = ["indexed dataset", "objective", "documents", "tokens", "chunks", "of at most", "cut", "in no example"]
    lines = [
        [
            _shorten(part["entry"]),
            part["objective"],
            *(f"{part[name]:,}" for name in ("documents", "document_tokens", "chunks")),
            f"{part['chunk_length']:,}",
            f"{part['cut_documents']:,}",
            f"{part['too_short']:,}",
        ]
        for part in plan["objectives"]
    ]
    return f"documents under their objectives; a chunk is a record above\n{align([header, *lines], left=2)}"


def _percent_cell(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _word_validation(plan: DataPlan) -> str:
    lines = [
        f"{part['name']}: {part['rows']:,} rows, {part['examples']:,} of {part['selected']:,} records, "
        f"{part['target_tokens']:,} target tokens"
        + (
            f"; {part['trained_on']:,} of the records are of documents that are trained on"
            if part["trained_on"]
            else ""
        )
        for part in plan["validation"]
    ]
    return "\n".join(["validation", *lines])


def display_width(text: str) -> int:
    """Return the columns that a terminal gives to a text: wide characters two, combining ones none.

    >>> [display_width(text) for text in ("sw", "日本", "é")]
    [2, 4, 1]
    """
    return sum(0 if combining(character) else 2 if east_asian_width(character) in "WF" else 1 for character in text)


def _shorten(name: str) -> str:
    """Cut the middle out of a long name; the end of a template's name is what tells it apart."""
    if display_width(name) <= NAME_WIDTH:
        return name
    return f"{name[: NAME_WIDTH // 2 - 1]}…{name[-NAME_WIDTH // 2 :]}"
