"""How long the examples are: of the data, and of what the run reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.planning.draws import Draws
from megatron_xmtf.planning.readable import ReadableExamples

__all__ = ["LengthHistogram", "RowFill", "length_histogram", "row_fill"]

BLOCK_EXAMPLES = 1 << 22


class LengthHistogram(TypedDict):
    """Examples by length; bin i holds lengths from edges[i] to edges[i + 1] - 1, the last one everything longer."""

    edges: list[int]
    """Tokens, inputs and targets together: 1, 2, 3, 4, 6, 8, 12, 16, 24... and what is too long for a row."""
    records: list[int]
    """Selected by the mixture, at their whole length."""
    examples: list[int]
    """Drawn, repeats included, at the length they have in a row."""
    mean: float
    """Of the examples drawn, as the next three."""
    median: int
    percentile_95: int
    longest: int


class RowFill(TypedDict):
    """How full the rows of the run are."""

    mean_fraction: float
    """Tokens that are not padding / tokens of all rows (`sequence_length` + 1 each)."""
    percentile_1_fraction: float
    """99 % of the rows are at least this full."""
    lowest_fraction: float


def length_edges(capacity: int) -> list[int]:
    """Return the first length of each bin; the last bin holds what is longer than `capacity`.

    >>> length_edges(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 21]
    """
    edges = sorted({size for power in range(capacity.bit_length() + 1) for size in (1 << power, (3 << power) // 2)})
    return [edge for edge in edges if edge <= capacity] + [capacity + 1]


def length_histogram(
    datasets: Sequence[ExampleDataset], readable: Sequence[ReadableExamples], draws: Draws, *, capacity: int
) -> LengthHistogram:
    """Count examples by length.

    Args:    capacity: tokens of a row, `sequence_length` + 1.
    """
    records = np.zeros(capacity + 2, np.int64)  # the last: too long
    drawn = np.zeros(capacity + 1, np.float64)
    for dataset, one, times in zip(datasets, readable, draws.times, strict=True):
        examples = one.fitting
        for first in range(0, len(dataset), BLOCK_EXAMPLES):
            block = slice(first, first + BLOCK_EXAMPLES)
            whole = dataset.input_lengths[block].astype(np.int64) + dataset.target_lengths[block]
            bounded = np.minimum(whole[one.is_selected[block]], capacity + 1)
            records += np.bincount(bounded, minlength=capacity + 2)
        for first in range(0, len(examples.ids), BLOCK_EXAMPLES):
            block = slice(first, first + BLOCK_EXAMPLES)
            weights = times[examples.ids[block]]
            drawn += np.bincount(examples.lengths[block], weights=weights, minlength=capacity + 1)
    edges = length_edges(capacity)
    counts = drawn.astype(np.int64)
    lengths = np.arange(capacity + 1)
    return {
        "edges": edges,
        "records": np.add.reduceat(records, edges).tolist(),
        "examples": np.add.reduceat(np.append(counts, 0), edges).tolist(),
        "mean": float(lengths @ counts / counts.sum()),
        "median": _percentile(counts, 0.5),
        "percentile_95": _percentile(counts, 0.95),
        "longest": int(np.flatnonzero(counts)[-1]),
    }


def _percentile(counts: NDArray[np.int64], part: float) -> int:
    """Return the smallest length that at least this part of the examples does not exceed."""
    return int(np.searchsorted(np.cumsum(counts), part * counts.sum()))


def row_fill(row_tokens: NDArray[np.int32], *, capacity: int) -> RowFill:
    """Describe how full rows of `capacity` tokens are."""
    return {
        "mean_fraction": float(row_tokens.mean() / capacity),
        "percentile_1_fraction": float(np.percentile(row_tokens, 1, method="lower") / capacity),
        "lowest_fraction": float(row_tokens.min() / capacity),
    }
