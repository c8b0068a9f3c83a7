"""Rows of two sides out of given pairs of token ids, without a dataset: what evaluation and `xmtf verify` ask.

encoder_length 8, decoder_length 4        pairs by falling length of inputs, each into the row that is open
pairs  ([6 7 8], [9 1])  ([4 5], [3 1])   row 0  encoder  6 7 8 4 5 0 0 0    segments  1 1 1 2 2 0 0 0
       ([2], [3 3 3])                            targets  9 1 3 1                      1 1 2 2
                                          row 1  encoder  2 0 0 0 0 0 0 0    segments  1 0 0 0 0 0 0 0
                                                 targets  3 3 3 0                      1 1 1 0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow

__all__ = ["join_pairs", "pack_pairs"]

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of inputs and targets."""


def pack_pairs(lengths: Sequence[tuple[int, int]], *, encoder_length: int, decoder_length: int) -> list[list[int]]:
    """Deal pairs to rows, those of similar inputs together.

    Args:    lengths: tokens of inputs and of targets of each pair, at most those of a row.
    Returns: positions of the pairs of each row; each position is in exactly one row.
    """
    rows: list[list[int]] = []
    inputs_left = targets_left = -1
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i][0], -lengths[i][1], i)):
        inputs, targets = lengths[position]
        assert inputs <= encoder_length and targets <= decoder_length, f"{lengths[position]} does not fit a row"
        if inputs > inputs_left or targets > targets_left:
            rows.append([])
            inputs_left, targets_left = encoder_length, decoder_length
        rows[-1].append(position)
        inputs_left, targets_left = inputs_left - inputs, targets_left - targets
    return rows


def join_pairs(
    pairs: Sequence[Pair],
    numbers: Sequence[int],
    *,
    encoder_length: int,
    decoder_length: int,
    pad_id: int,
    decoder_start_id: int,
) -> EncoderDecoderRow:
    """Lay pairs side by side in one row; a half of a pair that is empty leaves its number to the other side alone.

    Args:  numbers: `example_ids` of the row, one a pair.
    """
    encoder_tokens, encoder_segments = _side([inputs for inputs, _ in pairs], length=encoder_length, pad_id=pad_id)
    targets, decoder_segments = _side([targets for _, targets in pairs], length=decoder_length, pad_id=pad_id)
    return EncoderDecoderRow(
        encoder_tokens=encoder_tokens,
        encoder_segment_ids=encoder_segments,
        targets=targets,
        decoder_segment_ids=decoder_segments,
        decoder_start_id=decoder_start_id,
        dataset_ids=np.zeros(len(pairs), np.uint16),
        example_ids=np.asarray(numbers, np.int64),
    )


def _side(texts: Sequence[Sequence[int]], *, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and segment ids, int32 [length], of texts one behind the other."""
    tokens, segments = np.full(length, pad_id, np.int32), np.zeros(length, np.int32)
    begin = 0
    for number, text in enumerate(texts, start=1):
        tokens[begin : begin + len(text)] = text
        segments[begin : begin + len(text)] = number
        begin += len(text)
    return tokens, segments
