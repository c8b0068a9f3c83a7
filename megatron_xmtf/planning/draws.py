"""How often a run reads each example, what each weighs in the loss, and how full the rows are.

    row_offsets  0     2        5         two rows
    dataset_ids  0  1  0  0  1
    example_ids  7  2  3  7  2
    times        dataset 0: example 3 once, example 7 twice; dataset 1: example 2 twice; all others never

Counted in blocks of rows, so that memory follows the examples (6 to 18 bytes each), not the length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.planning.readable import ReadableExamples
from megatron_xmtf.progress import Progress

__all__ = ["Draws", "count_draws"]

BLOCK_SEGMENTS = 1 << 21
"""Segments counted at a time: some 60 MB of temporaries."""


@dataclass(frozen=True)
class Draws:
    """What the first rows of an index hold of each dataset."""

    times: list[NDArray[np.uint32]]
    """For each dataset [examples]: segments that are this example."""
    batch_loss: list[NDArray[np.float64]] | None
    """For each dataset [examples]: sum over its segments of their part of their batch's loss; None if not asked for."""
    row_tokens: NDArray[np.int32]
    """[rows], tokens that are not padding."""


def count_draws(
    datasets: Sequence[ExampleDataset],
    readable: Sequence[ReadableExamples],
    index: PackingIndex,
    *,
    rows: int,
    micro_batch_size: int | None = None,
    step_rows: StepRows | None = None,
) -> Draws:
    """Count the segments of rows 0 to `rows` - 1.

    Args:    readable: of each dataset, what the index was packed from. rows: at most the index's.
             micro_batch_size: rows of a micro-batch; given, each segment's part of its own is summed too, each target
             of it weighing the same. step_rows: which rows each step reads; given, the same within a step, each dataset
             of it weighing the same, and in it each target token. At most one of the two.
    """
    assert micro_batch_size is None or step_rows is None, "a segment has one part of the loss"
    has_loss = micro_batch_size is not None or step_rows is not None
    batches = step_rows or StepRows(micro_batch_size or 1)
    assert 0 < rows <= len(index), f"{rows} rows of an index of {len(index)}"
    # All datasets side by side: example e of dataset d is number firsts[d] + e.
    sizes = [len(dataset) for dataset in datasets]
    firsts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    small = np.uint16 if index.sequence_length < np.iinfo(np.uint16).max else np.uint32
    lengths = np.zeros(firsts[-1], small)
    target_tokens = np.zeros(firsts[-1] if has_loss else 0, small)
    for first, last, examples in zip(firsts[:-1].tolist(), firsts[1:].tolist(), readable, strict=True):
        fitting = examples.fitting
        lengths[first:last][fitting.ids] = fitting.lengths
        if has_loss:
            target_tokens[first:last][fitting.ids] = fitting.target_tokens
    times = np.zeros(firsts[-1], np.uint32)
    loss = np.zeros(len(target_tokens), np.float64)
    row_tokens = np.zeros(rows, np.int32)
    with Progress("count", total=rows, unit="rows") as progress:
        for begin, end in _row_blocks(index, rows, batches):
            offsets = np.asarray(index.row_offsets[begin : end + 1])
            segments = slice(int(offsets[0]), int(offsets[-1]))
            numbers = firsts[index.dataset_ids[segments]] + index.example_ids[segments]
            starts = offsets[:-1] - offsets[0]
            np.add.at(times, numbers, np.uint32(1))
            row_tokens[begin:end] = np.add.reduceat(lengths[numbers], starts, dtype=np.int64)
            if micro_batch_size:
                np.add.at(loss, numbers, _micro_batch_weights(target_tokens[numbers] > 0, starts[::micro_batch_size]))
            if step_rows:
                found = np.asarray(index.dataset_ids[segments])
                steps = range(step_rows.step_of(begin), step_rows.step_of(end - 1) + 1)
                firsts_of_steps = [step_rows.before(step) - begin for step in steps]
                parts = _dataset_weights(target_tokens[numbers], found, starts[firsts_of_steps])
                np.add.at(loss, numbers, parts)
            progress.advance(end - begin)
    places = list(zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True))
    return Draws(
        times=[times[first:last] for first, last in places],
        batch_loss=[loss[first:last] for first, last in places] if has_loss else None,
        row_tokens=row_tokens,
    )


def _row_blocks(index: PackingIndex, rows: int, batches: StepRows) -> Iterator[tuple[int, int]]:
    """Cut the rows into blocks of about `BLOCK_SEGMENTS` segments, each a whole number of batches."""
    begin = 0
    while begin < rows:
        reached = int(np.searchsorted(index.row_offsets, index.row_offsets[begin] + BLOCK_SEGMENTS, side="right")) - 1
        first = batches.step_of(begin)
        end = batches.before(max(first + 1, batches.step_of(reached)))
        yield begin, min(end, rows)
        begin = end


def _micro_batch_weights(has_target: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each segment's part of its micro-batch: 1 / targets there; 0 for a segment without one.

    Args:    has_target: [segments]. starts: [micro_batches], where each begins.
    """
    targets = np.add.reduceat(has_target, starts, dtype=np.int64)
    sizes = np.diff(np.append(starts, len(has_target)))
    return np.where(has_target, 1.0 / np.repeat(np.maximum(targets, 1), sizes), 0.0)


def _dataset_weights(
    target_tokens: NDArray[np.integer], dataset_ids: NDArray[np.integer], starts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return each segment's part of its global batch: its target tokens / those of its dataset there / datasets there.

    Args:    target_tokens, dataset_ids: [segments]. starts: [global batches], where each begins.
    """
    batches = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(target_tokens))))
    stride = int(dataset_ids.max()) + 1
    cells = batches * stride + dataset_ids  # one number for each dataset of each global batch
    of_cell = np.bincount(cells, weights=target_tokens, minlength=len(starts) * stride)
    present = np.count_nonzero(of_cell.reshape(len(starts), stride), axis=1)
    return np.asarray(target_tokens / np.maximum(of_cell[cells] * present[batches], 1))
