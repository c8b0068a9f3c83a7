"""Rows: the tokens of packed examples, side by side.

    examples      inputs [6 7], targets [8 2]          inputs [4], targets [5 2]
    tokens        6  7  8  2  4  5  2  0               sequence_length + 1 = 8 tokens, 0 is the padding here
    segment_ids   1  1  1  1  2  2  2  0               0 is padding, whatever token stands there
    is_target     0  0  1  1  0  1  1  0

What is padding is decided by `segment_ids` alone: the padding token may also be a real one, such as EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.best_fit import pack_lengths
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.errors import DatasetError

__all__ = ["Example", "IndexedRows", "PackedRows", "Row", "empty_row", "pack_examples"]

Example = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Inputs and targets of one example; plain text has no inputs."""


@dataclass(frozen=True)
class Row:
    """One packed line: `sequence_length` tokens that the model reads and one more, the label of the last."""

    tokens: NDArray[np.int32]
    """[sequence_length + 1], token ids."""
    segment_ids: NDArray[np.int32]
    """[sequence_length + 1], 1, 2, 3... for the examples of the row; 0 for padding."""
    is_target: NDArray[np.bool_]
    """[sequence_length + 1], whether the token belongs to a target."""
    dataset_ids: NDArray[np.uint16]
    """[segments], dataset of segment n at n - 1."""
    example_ids: NDArray[np.int64]
    """[segments], example of segment n at n - 1."""


class IndexedRows:
    """What rows of one line and of two sides have in common: the examples that an index puts into each.

    Args:    datasets: those the index was built from, in the same order. pad_id: token that fills a row's end.
    Raises:  DatasetError: the index names an example that a dataset does not have.
    """

    def __init__(self, datasets: Sequence[ExampleDataset], index: PackingIndex, *, pad_id: int) -> None:
        self.datasets, self.index, self.pad_id = list(datasets), index, pad_id
        names = [entry["name"] for entry in index.statistics["datasets"]]
        if len(names) != len(self.datasets):
            raise DatasetError(
                f"the packing index was built from {len(names)} datasets ({', '.join(names[:3])}), and "
                f"{len(self.datasets)} are given; build it again with `xmtf pack CONFIG`."
            )
        for dataset, required in zip(self.datasets, index.required_examples, strict=True):
            if required > len(dataset):
                raise DatasetError(
                    f"the packing index names example {required - 1} of dataset {dataset.name!r}, which has "
                    f"{len(dataset)} examples; build it again with `xmtf pack CONFIG`."
                )

    def __len__(self) -> int:
        return len(self.index)

    def segments(self, row: int) -> tuple[list[Example], NDArray[np.uint16], NDArray[np.int64]]:
        """Read what a row holds: its examples whole, and the dataset and number of each.

        Raises:  IndexError: there is no such row. DatasetError: the index was altered.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        begin, end = int(self.index.row_offsets[row]), int(self.index.row_offsets[row + 1])
        dataset_ids = np.array(self.index.dataset_ids[begin:end])
        example_ids = np.array(self.index.example_ids[begin:end], np.int64)
        try:
            examples = [
                self.datasets[dataset].example(example, occurrence=place)
                for place, dataset, example in zip(
                    range(begin, end), dataset_ids.tolist(), example_ids.tolist(), strict=True
                )
            ]
        except IndexError as error:
            raise DatasetError(
                f"row {row} of the packing index names an example that there is not ({error}): the index was altered "
                "after it was verified. Remove its directory and run `xmtf pack CONFIG` again."
            ) from error
        return examples, dataset_ids, example_ids

    def cut(self, inputs: NDArray[np.int32], excess: int) -> NDArray[np.int32]:
        """Take `excess` tokens off the inputs, where the index was built with such a policy."""
        if excess <= 0:
            return inputs
        if self.index.long_examples == "truncate_inputs_left":
            return inputs[excess:]
        if self.index.long_examples == "truncate_inputs_right":
            return inputs[:-excess]
        return inputs


class PackedRows(IndexedRows):
    """The rows that an index describes, read from their datasets when asked for; see `IndexedRows`."""

    def __init__(self, datasets: Sequence[ExampleDataset], index: PackingIndex, *, pad_id: int) -> None:
        super().__init__(datasets, index, pad_id=pad_id)
        assert isinstance(index.row_lengths, int), "rows of two sides are `EncoderDecoderRows`"
        self.sequence_length = index.row_lengths

    def __getitem__(self, row: int) -> Row:
        """Read a row.

        Raises:  IndexError: there is no such row. DatasetError: the data no longer have the lengths packed.
        """
        examples, dataset_ids, example_ids = self.segments(row)
        capacity = self.sequence_length + 1
        return _build_row(
            [(self.cut(inputs, len(inputs) + len(targets) - capacity), targets) for inputs, targets in examples],
            dataset_ids=dataset_ids,
            example_ids=example_ids,
            sequence_length=self.sequence_length,
            pad_id=self.pad_id,
            what=f"row {row}",
        )

    def empty(self) -> Row:
        """Return a row of padding alone, to complete a last micro-batch."""
        return empty_row(sequence_length=self.sequence_length, pad_id=self.pad_id)


def _build_row(
    examples: Sequence[Example],
    *,
    dataset_ids: NDArray[np.uint16],
    example_ids: NDArray[np.int64],
    sequence_length: int,
    pad_id: int,
    what: str,
) -> Row:
    """Lay examples side by side and fill the rest with padding."""
    capacity = sequence_length + 1
    # Inputs and targets alternate: [inputs 1, targets 1, inputs 2, targets 2, ...].
    parts = [part for example in examples for part in example]
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    used = int(lengths.sum())
    if used > capacity:
        raise DatasetError(
            f"{what} has {used} tokens, it can hold {capacity} (sequence_length + 1): the data are not those that were "
            "packed. Build the index again with `xmtf pack CONFIG`."
        )
    tokens = np.full(capacity, pad_id, np.int32)
    segment_ids = np.zeros(capacity, np.int32)
    is_target = np.zeros(capacity, np.bool_)
    if parts:
        np.concatenate(parts, out=tokens[:used], casting="same_kind")
        numbers = np.arange(len(parts))
        segment_ids[:used] = np.repeat(numbers // 2 + 1, lengths)
        is_target[:used] = np.repeat(numbers % 2 == 1, lengths)
    return Row(tokens, segment_ids, is_target, dataset_ids, example_ids)


def empty_row(*, sequence_length: int, pad_id: int) -> Row:
    """Return a row of padding alone, to complete a last micro-batch."""
    return _build_row(
        [],
        dataset_ids=np.zeros(0, np.uint16),
        example_ids=np.zeros(0, np.int64),
        sequence_length=sequence_length,
        pad_id=pad_id,
        what="an empty row",
    )


def pack_examples(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]], *, sequence_length: int, pad_id: int, seed: int = 0
) -> list[Row]:
    """Pack tokenised examples in memory.

    Args:    examples: (inputs, targets) token ids; inputs may be empty, targets not.
    Returns: rows whose `example_ids` are positions in `examples`; each position is in exactly one row.
    Raises:  DatasetError: an example longer than sequence_length + 1 tokens, or without targets.
    """
    arrays = [(np.asarray(inputs, np.int32), np.asarray(targets, np.int32)) for inputs, targets in examples]
    for number, (inputs, targets) in enumerate(arrays):
        if not len(targets) or len(inputs) + len(targets) > sequence_length + 1:
            raise DatasetError(
                f"example {number} has {len(inputs)} + {len(targets)} tokens (inputs + targets); it needs at least one "
                f"target token and at most {sequence_length + 1} in all (sequence_length + 1)."
            )
    lengths = np.array([len(inputs) + len(targets) for inputs, targets in arrays], np.int64)
    row_offsets, order = pack_lengths(lengths, capacity=sequence_length + 1, seed=seed)
    return [
        _build_row(
            [arrays[number] for number in order[begin:end].tolist()],
            dataset_ids=np.zeros(end - begin, np.uint16),
            example_ids=order[begin:end].astype(np.int64),
            sequence_length=sequence_length,
            pad_id=pad_id,
            what=f"row {row}",
        )
        for row, (begin, end) in enumerate(zip(row_offsets[:-1].tolist(), row_offsets[1:].tolist(), strict=True))
    ]
