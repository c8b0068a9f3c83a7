"""What a run measures its validation loss on, and whether any of that is trained on too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.checkpoint.model_tokenizer import objective_tokenizer
from megatron_xmtf.config.schema import DatasetConfig, RunConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import pack_dataset
from megatron_xmtf.data.selection import select_examples

__all__ = ["ValidationPlan", "plan_validation"]

BLOCK_EXAMPLES = 1 << 22


class ValidationPlan(TypedDict):
    """One validation dataset: its first `evaluation.rows` rows."""

    name: str
    records: int
    selected: int
    """Records that its split, where and exclude leave."""
    rows: int
    examples: int
    tokens: int
    target_tokens: int
    dropped: int
    truncated: int
    empty: int
    trained_on: int | None
    """Selected records of documents that the training mixture selects too; None where the data name no documents."""


def plan_validation(
    config: RunConfig, training: Sequence[ExampleDataset], is_trained: Sequence[NDArray[np.bool_]]
) -> list[ValidationPlan]:
    """Describe each validation dataset.

    Args:    training: the training datasets. is_trained: for each of them [examples], what the mixture selects.
    Raises:  ConfigError, DatasetError: as `open_datasets` and `pack_dataset`.
    """
    entries = config.data.validation_datasets
    datasets = open_datasets(entries, batch=config.batch, tokenizer=objective_tokenizer(config))
    return [
        _describe(config, entry, dataset, training, is_trained)
        for entry, dataset in zip(entries, datasets, strict=True)
    ]


def _describe(
    config: RunConfig,
    entry: DatasetConfig,
    dataset: ExampleDataset,
    training: Sequence[ExampleDataset],
    is_trained: Sequence[NDArray[np.bool_]],
) -> ValidationPlan:
    statistics = pack_dataset(
        dataset,
        entry=entry,
        split_seed=config.data.split_seed,
        sequence_length=config.batch.row_lengths,
        long_examples=config.data.long_examples,
        rows=config.evaluation.rows,
    ).statistics
    chosen = select_examples(dataset, [entry], split=entry.split, split_seed=config.data.split_seed)
    return {
        "name": dataset.name,
        "records": len(dataset),
        "selected": len(dataset) if chosen is None else int(np.count_nonzero(chosen)),
        "rows": statistics["rows"],
        "examples": statistics["examples"],
        "tokens": statistics["tokens"],
        "target_tokens": statistics["target_tokens"],
        "dropped": statistics["dropped"],
        "truncated": statistics["truncated"],
        "empty": statistics["empty"],
        "trained_on": _count_trained(dataset, chosen, training, is_trained),
    }


def _count_trained(
    dataset: ExampleDataset,
    chosen: NDArray[np.bool_] | None,
    training: Sequence[ExampleDataset],
    is_trained: Sequence[NDArray[np.bool_]],
) -> int | None:
    """Count the chosen examples whose document some training dataset has among what is trained on."""
    if dataset.documents is None:
        return None
    documents, counts = np.unique(
        np.asarray(dataset.documents)[slice(None) if chosen is None else chosen], return_counts=True
    )
    is_shared = np.zeros(len(documents), np.bool_)
    for other, selected in zip(training, is_trained, strict=True):
        if other.documents is None:
            continue
        for first in range(0, len(other), BLOCK_EXAMPLES):
            block = slice(first, first + BLOCK_EXAMPLES)
            numbers = np.asarray(other.documents[block])[selected[block]]
            places = np.minimum(np.searchsorted(documents, numbers), len(documents) - 1)
            is_shared[places[documents[places] == numbers]] = True
    return int(counts[is_shared].sum())
