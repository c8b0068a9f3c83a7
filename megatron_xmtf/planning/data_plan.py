"""The data plan of a run: what it reads, how often, and what part of the loss that is, before any GPU hour.

    config --open, pack--> the rows of the run --count--> draws of each example --sum--> dataset x language

Counted from the packing index itself, the one that training opens, so that plan and run cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from megatron_xmtf.checkpoint.model_tokenizer import objective_tokenizer
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards import GuardFlags
from megatron_xmtf.data.loader import require_even_deal
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.objectives import ObjectiveCounts, ObjectiveDataset
from megatron_xmtf.data.packing import build_packing_index, index_directory, index_path
from megatron_xmtf.data.packing_index import ComponentStatistics, PackingIndex
from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.planning.draws import count_draws
from megatron_xmtf.planning.guard_plan import GuardPlan, describe_guards, find_flags
from megatron_xmtf.planning.lengths import LengthHistogram, RowFill, length_histogram, row_fill
from megatron_xmtf.planning.plan_warnings import PlanWarning, data_warnings
from megatron_xmtf.planning.readable import find_readable
from megatron_xmtf.planning.tally import describe, merge_tallies, tally_examples
from megatron_xmtf.planning.validation_plan import ValidationPlan, plan_validation

__all__ = ["DataPlan", "RunTotals", "build_data_plan", "plan_data"]


class RunTotals(TypedDict):
    """The whole run, and a step of it on average."""

    steps: int
    warmup_steps: int
    rows: int
    examples: int
    tokens: int
    """Without padding."""
    target_tokens: int
    epochs: float
    """Examples read per example that can be drawn, over all datasets."""
    rows_per_step: float
    examples_per_step: float
    tokens_per_step: float
    target_tokens_per_step: float
    examples_per_row: float
    row_fill: RowFill


class ObjectivePlan(ObjectiveCounts):
    """Documents of one dataset, and the examples that its objective makes of them."""

    entry: str


class SidesPlan(TypedDict):
    """How the two sides of an encoder-decoder's rows are filled."""

    encoder_length: int
    decoder_length: int
    encoder_fill_fraction: float
    decoder_fill_fraction: float
    fewest_rows: int
    """No packing of the same examples has fewer rows."""


def _sides(index: PackingIndex) -> SidesPlan | None:
    lengths, statistics = index.row_lengths, index.statistics
    if isinstance(lengths, int):
        return None
    return {
        "encoder_length": lengths.encoder_length,
        "decoder_length": lengths.decoder_length,
        "encoder_fill_fraction": statistics["encoder_fill_fraction"],
        "decoder_fill_fraction": statistics["decoder_fill_fraction"],
        "fewest_rows": statistics["fewest_rows"],
    }


class DataPlan(TypedDict):
    """What `xmtf plan CONFIG --json` prints under `data`."""

    index: str
    """Directory of the packing index, which training opens."""
    key: str
    sequence_length: int
    sides: SidesPlan | None
    """Of the rows of an encoder-decoder; None for rows of one line."""
    long_examples: str
    normalization: str
    run: RunTotals
    lengths: LengthHistogram
    entries: list[Any]
    """`TallyRow` and `entry`: each dataset of the configuration, in its order."""
    datasets: list[Any]
    """`TallyRow` and `dataset`, the name that records give or else the entry's; the largest part of the loss first."""
    languages: list[Any]
    """`TallyRow` and `language`."""
    cells: list[Any]
    """`TallyRow`, `dataset` and `language`."""
    by: dict[str, list[Any]]
    """For each further column asked for: `TallyRow` and that column."""
    unit: str | None
    """What the mixture counts: examples, tokens or target_tokens; None for a list of datasets without weights."""
    components: list[ComponentStatistics]
    """The parts of the mixture: wanted_share and share of the whole in that unit, epochs, what held it."""
    guards: GuardPlan
    """What was looked for; the lines of all tables have the keys `guards.checked`, of `GuardCounts`."""
    objectives: list[ObjectivePlan]
    """What became of the documents of each dataset that is read under an objective."""
    validation: list[ValidationPlan]
    warnings: list[PlanWarning]


def build_data_plan(config: RunConfig, *, by: Sequence[str] = ()) -> DataPlan:
    """Plan the data of a run; its packing index is opened, or built where the run looks for it.

    Args:    by: further columns to count by, such as template or task.
    Raises:  ConfigError: a column that no dataset has, or a global batch that is no whole number of micro-batches.
             DatasetError: as `open_datasets` and `build_packing_index`.
    """
    require_even_deal(config.batch.step_rows, config.batch.micro_batch_size, 1)
    tokenizer = objective_tokenizer(config)
    datasets = open_datasets(config.data.training_datasets, batch=config.batch, tokenizer=tokenizer)
    known = sorted({column for dataset in datasets for column in dataset.column_names})
    for column in by:
        if column not in known:
            raise ConfigError(f"no dataset has a column {column!r}, {nearest_names(column, known)}.")
    flags, why_none = find_flags(config, datasets)
    directory = index_directory(config)
    index = build_packing_index(
        datasets,
        data=config.data,
        sequence_length=config.batch.row_lengths,
        rows_needed=config.train_rows,
        seed=config.seed,
        directory=directory,
        guards=flags if flags is not None and flags.settings.dropped() else None,
    )
    path = index_path(directory, index.key)
    return plan_data(config, datasets, index, path=path, flags=flags, why_no_flags=why_none, by=by)


def plan_data(
    config: RunConfig,
    datasets: Sequence[ExampleDataset],
    index: PackingIndex,
    *,
    path: Path,
    flags: GuardFlags | None = None,
    why_no_flags: str = "",
    by: Sequence[str] = (),
) -> DataPlan:
    """Count what a run reads of an index.

    Args:    datasets: those of the index, in its order. path: where the index lies. flags, why_no_flags: of
             `find_flags`. by: as `build_data_plan`.
    """
    guards = describe_guards(config, flags, why_no_flags)
    capacity, normalization = index.capacity, config.loss.normalization
    rows = config.train_rows
    readable = find_readable(config, datasets, guards=flags)
    per_micro_batch = normalization == "target_sequence_per_micro_batch"
    draws = count_draws(
        datasets,
        readable,
        index,
        rows=rows,
        micro_batch_size=config.batch.micro_batch_size if per_micro_batch else None,
        step_rows=config.batch.step_rows if normalization == "dataset" else None,
    )

    def tally(*columns: str) -> Any:
        return tally_examples(
            datasets,
            readable,
            draws,
            by=columns,
            normalization=normalization,
            flags=None if flags is None else flags.flags,
        )

    def lines(tallies: Any, *columns: str) -> list[dict[str, Any]]:
        described = describe(tallies, guards=guards["checked"])
        return [{**dict(zip(columns, key, strict=True)), **row} for key, row in described.items()]

    fine = tally("entry", "dataset", "language")
    entries = lines(merge_tallies(fine, [0]), "entry")
    has_shares = config.data.mixture is not None or any(entry.weight is not None for entry in config.data.train)
    order = {dataset.name: place for place, dataset in enumerate(datasets)}
    entries.sort(key=lambda row: order[row["entry"]])
    plan: DataPlan = {
        "index": str(path),
        "key": index.key,
        "sequence_length": index.sequence_length,
        "sides": _sides(index),
        "long_examples": index.long_examples,
        "normalization": normalization,
        "run": _run_totals(config, entries, fill=row_fill(draws.row_tokens, capacity=capacity)),
        "lengths": length_histogram(datasets, readable, draws, capacity=capacity),
        "entries": entries,
        "datasets": lines(merge_tallies(fine, [1]), "dataset"),
        "languages": lines(merge_tallies(fine, [2]), "language"),
        "cells": lines(merge_tallies(fine, [1, 2]), "dataset", "language"),
        "by": {column: lines(tally(column), column) for column in by},
        "unit": config.data.training_mixture.unit if has_shares else None,
        "components": index.statistics["components"],
        "guards": guards,
        "objectives": [
            {"entry": dataset.name, **dataset.counts()} for dataset in datasets if isinstance(dataset, ObjectiveDataset)
        ],
        "validation": plan_validation(config, datasets, [one.is_selected for one in readable]),
        "warnings": [],
    }
    plan["warnings"] = data_warnings(plan)
    return plan


def _run_totals(config: RunConfig, entries: Sequence[dict[str, Any]], *, fill: RowFill) -> RunTotals:
    steps, rows = config.train_steps, config.train_rows
    totals = {name: sum(row[name] for row in entries) for name in ("examples", "tokens", "target_tokens", "available")}
    return {
        "steps": steps,
        "warmup_steps": config.batch.step_rows.step_of(config.warmup_rows - 1) + 1 if config.warmup_rows else 0,
        "rows": rows,
        "examples": totals["examples"],
        "tokens": totals["tokens"],
        "target_tokens": totals["target_tokens"],
        "epochs": totals["examples"] / totals["available"],
        "rows_per_step": rows / steps,
        "examples_per_step": totals["examples"] / steps,
        "tokens_per_step": totals["tokens"] / steps,
        "target_tokens_per_step": totals["target_tokens"] / steps,
        "examples_per_row": totals["examples"] / rows,
        "row_fill": fill,
    }
