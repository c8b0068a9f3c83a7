"""Rows of two sides: the inputs of packed examples for the encoder, their targets for the decoder.

    examples              inputs [6 7], targets [8 9 1]         inputs [4], targets [5 1]
    encoder_tokens        6  7  1  4  1  0  0  0                inputs end with EOS where `batch.encoder_eos` says so
    encoder_segment_ids   1  1  1  2  2  0  0  0
    targets               8  9  1  5  1  0
    decoder_segment_ids   1  1  1  2  2  0                      the same number on both sides

What is padding is decided by the segment ids alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["EncoderDecoderRow"]


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
