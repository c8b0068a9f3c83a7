"""Rows of two sides: the inputs of packed examples for the encoder, their targets for the decoder.

    examples              inputs [6 7], targets [8 9 1]         inputs [4], targets [5 1]
    encoder_tokens        6  7  1  4  1  0  0  0                inputs end with EOS where `batch.encoder_eos` says so
    encoder_segment_ids   1  1  1  2  2  0  0  0
    targets               8  9  1  5  1  0
    decoder_segment_ids   1  1  1  2  2  0                      the same number on both sides

What is padding is decided by the segment ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import encoder_ends
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.rows import Example, IndexedRows
from megatron_xmtf.data.two_sided_fit import pack_two_sided
from megatron_xmtf.errors import DatasetError

__all__ = ["EncoderDecoderRow", "EncoderDecoderRows", "pack_examples_two_sided"]


@dataclass(frozen=True)
class EncoderDecoderRow:
    """One packed line of two sides."""

    encoder_tokens: NDArray[np.int32]
    """[encoder_length], token ids."""
    encoder_segment_ids: NDArray[np.int32]
    """[encoder_length], 1, 2, 3... for the examples of the row; 0 for padding."""
    targets: NDArray[np.int32]
    """[decoder_length], token ids: the labels."""
    decoder_segment_ids: NDArray[np.int32]
    """[decoder_length], as on the encoder's side."""
    decoder_start_id: int
    """What the decoder reads first in each segment (`decoder_start_token_id` of the model)."""
    dataset_ids: NDArray[np.uint16]
    """[segments], dataset of segment n at n - 1."""
    example_ids: NDArray[np.int64]
    """[segments], example of segment n at n - 1."""


class EncoderDecoderRows(IndexedRows):
    """The two-sided rows that an index describes, read from their datasets when asked for.

    Args:    datasets, pad_id: as `IndexedRows`. eos_id: put behind the inputs where `encoder_eos` says so.
             decoder_start_id: what the model's decoder reads first.
    """

    def __init__(
        self,
        datasets: Sequence[ExampleDataset],
        index: PackingIndex,
        *,
        pad_id: int,
        eos_id: int,
        decoder_start_id: int,
    ) -> None:
        super().__init__(datasets, index, pad_id=pad_id)
        assert isinstance(index.row_lengths, EncoderDecoderLengths), "rows of one line are `PackedRows`"
        self.lengths, self.eos_id, self.decoder_start_id = index.row_lengths, eos_id, decoder_start_id
        self._ends = [np.full(encoder_ends(dataset, self.lengths), eos_id, np.int32) for dataset in self.datasets]

    def __getitem__(self, row: int) -> EncoderDecoderRow:
        """Read a row.

        Raises:  IndexError: there is no such row. DatasetError: the data no longer have the lengths packed.
        """
        examples, dataset_ids, example_ids = self.segments(row)
        ended = [
            (self._with_end(inputs, self._ends[dataset]), targets)
            for (inputs, targets), dataset in zip(examples, dataset_ids.tolist(), strict=True)
        ]
        return self._build(ended, dataset_ids, example_ids, what=f"row {row}")

    def _with_end(self, inputs: NDArray[np.int32], end: NDArray[np.int32]) -> NDArray[np.int32]:
        """Cut inputs that are too long, and put EOS behind them: it is kept whatever is cut."""
        excess = len(inputs) + len(end) - self.lengths.encoder_length
        return np.concatenate([self.cut(inputs, excess), end])

    def empty(self) -> EncoderDecoderRow:
        """Return a row of padding alone, to complete a last micro-batch."""
        return self._build([], np.zeros(0, np.uint16), np.zeros(0, np.int64), what="an empty row")

    def _build(
        self,
        examples: Sequence[Example],
        dataset_ids: NDArray[np.uint16],
        example_ids: NDArray[np.int64],
        *,
        what: str,
    ) -> EncoderDecoderRow:
        return _build_row(
            examples,
            dataset_ids=dataset_ids,
            example_ids=example_ids,
            lengths=self.lengths,
            pad_id=self.pad_id,
            decoder_start_id=self.decoder_start_id,
            what=what,
        )


def pack_examples_two_sided(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    lengths: EncoderDecoderLengths,
    pad_id: int,
    eos_id: int,
    decoder_start_id: int,
    seed: int = 0,
) -> list[EncoderDecoderRow]:
    """Pack tokenised examples in memory.

    Args:    examples: (inputs, targets) token ids; EOS is put behind the inputs where `lengths.encoder_eos`.
    Returns: rows whose `example_ids` are positions in `examples`; each position is in exactly one row.
    Raises:  DatasetError: an example with an empty side, or one that does not fit its side.
    """
    end = [eos_id] if lengths.encoder_eos else []
    arrays = [(np.array([*inputs, *end], np.int32), np.asarray(targets, np.int32)) for inputs, targets in examples]
    row_offsets, order = pack_two_sided(
        np.array([len(inputs) for inputs, _ in arrays], np.int64),
        np.array([len(targets) for _, targets in arrays], np.int64),
        encoder_length=lengths.encoder_length,
        decoder_length=lengths.decoder_length,
        seed=seed,
    )
    return [
        _build_row(
            [arrays[number] for number in order[begin:end].tolist()],
            dataset_ids=np.zeros(end - begin, np.uint16),
            example_ids=order[begin:end].astype(np.int64),
            lengths=lengths,
            pad_id=pad_id,
            decoder_start_id=decoder_start_id,
            what=f"row {row}",
        )
        for row, (begin, end) in enumerate(zip(row_offsets[:-1].tolist(), row_offsets[1:].tolist(), strict=True))
    ]


def _build_row(
    examples: Sequence[Example],
    *,
    dataset_ids: NDArray[np.uint16],
    example_ids: NDArray[np.int64],
    lengths: EncoderDecoderLengths,
    pad_id: int,
    decoder_start_id: int,
    what: str,
) -> EncoderDecoderRow:
    """Lay the examples of a row side by side on both sides."""
    encoder_tokens, encoder_segment_ids = _side(
        [inputs for inputs, _ in examples], lengths.encoder_length, pad_id=pad_id, what=f"{what} (encoder_length)"
    )
    targets, decoder_segment_ids = _side(
        [targets for _, targets in examples], lengths.decoder_length, pad_id=pad_id, what=f"{what} (decoder_length)"
    )
    return EncoderDecoderRow(
        encoder_tokens, encoder_segment_ids, targets, decoder_segment_ids, decoder_start_id, dataset_ids, example_ids
    )


def _side(
    parts: Sequence[NDArray[np.int32]], length: int, *, pad_id: int, what: str
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (tokens, segment ids) of one side, [length]."""
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    used = int(sizes.sum())
    if used > length or not sizes.all():
        raise DatasetError(
            f"{what} has {used} tokens in {len(parts)} examples, it can hold {length} and none may be empty: the data "
            "are not those that were packed. Build the index again with `xmtf pack CONFIG`."
        )
    tokens, segment_ids = np.full(length, pad_id, np.int32), np.zeros(length, np.int32)
    if parts:
        np.concatenate(parts, out=tokens[:used], casting="same_kind")
        segment_ids[:used] = np.repeat(np.arange(1, len(parts) + 1), sizes)
    return tokens, segment_ids
