"""Count what a packing index holds: of each dataset and of each component of the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths, row_capacity
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import LeftOut, segment_tokens
from megatron_xmtf.data.mixture import Component, Mixture
from megatron_xmtf.data.packing_index import ComponentStatistics, DatasetStatistics, PackingStatistics
from megatron_xmtf.data.two_sided_fit import fewest_rows

__all__ = ["component_statistics", "dataset_statistics", "fewest_rows_of", "packing_statistics"]

BLOCK = 1 << 20
"""Segments counted at a time."""


def dataset_statistics(
    datasets: Sequence[ExampleDataset],
    available: Sequence[int],
    left_out: Sequence[LeftOut],
    dataset_ids: NDArray[np.uint16],
    example_ids: NDArray[np.integer],
    *,
    row_lengths: RowLengths,
) -> list[DatasetStatistics]:
    """Count the segments of each dataset, in time that does not grow with the number of datasets.

    Args:    available: examples of each dataset that could be drawn. left_out: of each dataset. dataset_ids,
             example_ids: [segments], what is in the rows. row_lengths: tokens of a row.
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
            tokens, predicted = segment_tokens(datasets[number], ids, lengths=row_lengths, places=part + begin)
            counts[0, number] += len(ids)
            counts[1, number] += int(tokens.sum())
            counts[2, number] += int(predicted.sum())
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


def fewest_rows_of(
    datasets: Sequence[ExampleDataset],
    dataset_ids: NDArray[np.uint16],
    example_ids: NDArray[np.integer],
    *,
    row_lengths: RowLengths,
) -> int | None:
    """Return a number of rows below which no packing of these segments can go; None for rows of one line."""
    if not isinstance(row_lengths, EncoderDecoderLengths):
        return None
    width = row_lengths.decoder_length + 1
    counts = np.zeros((row_lengths.encoder_length + 1) * width, np.int64)
    for begin in range(0, len(example_ids), BLOCK):
        owners, drawn = dataset_ids[begin : begin + BLOCK], example_ids[begin : begin + BLOCK]
        for number in np.unique(owners).tolist():
            tokens, targets = segment_tokens(datasets[number], drawn[owners == number], lengths=row_lengths)
            counts += np.bincount((tokens - targets) * width + targets, minlength=len(counts))
    return fewest_rows(counts.reshape(-1, width))


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
    row_lengths: RowLengths,
    fewest_rows: int | None = None,
) -> PackingStatistics:
    """Sum the statistics of the datasets.

    Args:    fewest_rows: of rows of two sides, below which no packing can go.
    """
    tokens = sum(entry["tokens"] for entry in each)
    target_tokens = sum(entry["target_tokens"] for entry in each)
    statistics: PackingStatistics = {
        "rows": rows,
        "examples": sum(entry["examples"] for entry in each),
        "repeats": sum(entry["repeats"] for entry in each),
        "epochs": epochs,
        "tokens": tokens,
        "target_tokens": target_tokens,
        "fill_fraction": tokens / (rows * row_capacity(row_lengths)),
        "dropped": sum(entry["dropped"] for entry in each),
        "truncated": sum(entry["truncated"] for entry in each),
        "empty": sum(entry["empty"] for entry in each),
        "datasets": each,
        "components": components,
    }
    if isinstance(row_lengths, EncoderDecoderLengths):
        statistics["encoder_fill_fraction"] = (tokens - target_tokens) / (rows * row_lengths.encoder_length)
        statistics["decoder_fill_fraction"] = target_tokens / (rows * row_lengths.decoder_length)
        if fewest_rows is not None:
            statistics["fewest_rows"] = fewest_rows
    return statistics
