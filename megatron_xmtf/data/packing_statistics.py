"""Count what a packing index holds: of each dataset and of each component of the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import LeftOut
from megatron_xmtf.data.mixture import Component, Mixture
from megatron_xmtf.data.packing_index import ComponentStatistics, DatasetStatistics, PackingStatistics

__all__ = ["component_statistics", "dataset_statistics", "packing_statistics"]

BLOCK = 1 << 20
"""Segments counted at a time."""


def dataset_statistics(
    datasets: Sequence[ExampleDataset],
    available: Sequence[int],
    left_out: Sequence[LeftOut],
    dataset_ids: NDArray[np.uint16],
    example_ids: NDArray[np.integer],
    *,
    capacity: int,
) -> list[DatasetStatistics]:
    """Count the segments of each dataset, in time that does not grow with the number of datasets.

    Args:    available: examples of each dataset that could be drawn. left_out: of each dataset. dataset_ids,
             example_ids: [segments], what is in the rows. capacity: tokens of a row.
    """
    seen = [np.zeros(len(dataset), np.bool_) for dataset in datasets]
    counts = np.zeros((3, len(datasets)), np.int64)  # segments, tokens, target tokens
    for begin in range(0, len(example_ids), BLOCK):
        owners, drawn = dataset_ids[begin : begin + BLOCK], example_ids[begin : begin + BLOCK]
        order = np.argsort(owners, kind="stable")
        found, first = np.unique(owners[order], return_index=True)
        for number, part in zip(found.tolist(), np.split(order, first[1:]), strict=True):
            ids = drawn[part]
            seen[number][ids] = True
            inputs, targets = datasets[number].input_lengths[ids], datasets[number].target_lengths[ids]
            counts[0, number] += len(ids)
            counts[1, number] += int(np.minimum(inputs.astype(np.int64) + targets, capacity).sum())
            # The first token of a segment without inputs has nothing before it that could predict it.
            counts[2, number] += int((targets - (inputs == 0)).sum(dtype=np.int64))
    return [
        {
            "name": dataset.name,
            "examples": int(counts[0, number]),
            "repeats": int(counts[0, number]) - int(np.count_nonzero(seen[number])),
            "epochs": int(counts[0, number]) / available[number] if available[number] else 0.0,
            "tokens": int(counts[1, number]),
            "target_tokens": int(counts[2, number]),
            "dropped": left_out[number].dropped,
            "truncated": left_out[number].truncated,
            "empty": left_out[number].empty,
        }
        for number, dataset in enumerate(datasets)
    ]


def component_statistics(
    mixture: Mixture, datasets: Sequence[ExampleDataset], counts: Sequence[int], sizes: Sequence[float]
) -> list[ComponentStatistics]:
    """Compare what each component has with what it should have.

    Args:    counts: segments of each component. sizes: the same in the mixture's unit.
    """
    whole = sum(sizes)
    rows = zip(mixture.components, mixture.wanted_shares(), mixture.raised_by_floors(), counts, sizes, strict=True)
    return [
        {
            "name": component.name,
            "dataset": datasets[component.dataset].name,
            "wanted_share": wanted,
            "share": size / whole if whole else 0.0,
            "available": len(component.examples),
            "examples": count,
            "epochs": count / len(component.examples) if len(component.examples) else 0.0,
            "limited_by": _limit(component, count, raised=raised),
        }
        for component, wanted, raised, count, size in rows
    ]


def _limit(component: Component, count: int, *, raised: bool) -> str | None:
    if component.max_epochs is not None and count >= component.allowance:
        return "max_epochs"
    return "floor" if raised else None


def packing_statistics(
    each: list[DatasetStatistics],
    components: list[ComponentStatistics],
    *,
    rows: int,
    epochs: int,
    capacity: int,
) -> PackingStatistics:
    """Sum the statistics of the datasets."""
    tokens = sum(entry["tokens"] for entry in each)
    return {
        "rows": rows,
        "examples": sum(entry["examples"] for entry in each),
        "repeats": sum(entry["repeats"] for entry in each),
        "epochs": epochs,
        "tokens": tokens,
        "target_tokens": sum(entry["target_tokens"] for entry in each),
        "fill_fraction": tokens / (rows * capacity),
        "dropped": sum(entry["dropped"] for entry in each),
        "truncated": sum(entry["truncated"] for entry in each),
        "empty": sum(entry["empty"] for entry in each),
        "datasets": each,
        "components": components,
    }
