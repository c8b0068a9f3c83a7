"""Build the training tensors of an encoder-decoder from rows packed on both sides.

    row of encoder_length 8, decoder_length 6: example 1 has inputs [6 7 1], targets [8 9 1], example 2 [4 1] and [5 1]
    (1 is </s>, 0 is both the padding and what a decoder starts with)

    encoder_tokens         6  7  1  4  1  0  0  0
    encoder_segment_ids    1  1  1  2  2  0  0  0
    encoder_position_ids   0  1  2  0  1  0  0  0

    decoder_tokens         0  8  9  0  5  0             labels of the same segment, moved right behind the start token
    decoder_segment_ids    1  1  1  2  2  0
    decoder_position_ids   0  1  2  0  1  0
    labels                 8  9  1  5  1  0
    loss_weights          1/3 1/3 1/3 1/2 1/2 0         target_sequence; the others: `loss_weights.py`
    loss_positions         0  1  2  3  4                row by row of [decoder_length, micro_batch]

An example has the same number on both sides: segment n of the decoder attends to segment n of the encoder, and to no
other. Every token of a target is predicted, the first one from the start token.
Invariant: num_target_tokens == number of positions with decoder_segment_ids > 0.
Source:  `shift_right` of T5 (Raffel et al. 2020; `transformers` `_shift_right`), segment by segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_xmtf.data.batch import move
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow
from megatron_xmtf.data.loss_weights import LossNormalization, segment_positions, weigh_targets

__all__ = ["EncoderDecoderBatch", "build_encoder_decoder_batch"]

TENSORS = (
    "encoder_tokens",
    "encoder_segment_ids",
    "encoder_position_ids",
    "decoder_tokens",
    "decoder_segment_ids",
    "decoder_position_ids",
    "labels",
    "loss_weights",
    "loss_positions",
)


@dataclass(frozen=True)
class EncoderDecoderBatch:
    """One micro-batch; tensors are on CPU until `to` moves them."""

    encoder_tokens: torch.Tensor
    """int64 [micro_batch, encoder_length], what the encoder reads."""
    encoder_segment_ids: torch.Tensor
    """int64 [micro_batch, encoder_length], 1, 2, 3... within a row; 0 is padding."""
    encoder_position_ids: torch.Tensor
    """int64 [micro_batch, encoder_length], from 0 in each segment; 0 on padding."""
    decoder_tokens: torch.Tensor
    """int64 [micro_batch, decoder_length], what the decoder reads: in each segment the start token, then its labels but
    the last."""
    decoder_segment_ids: torch.Tensor
    """int64 [micro_batch, decoder_length], the encoder's number of the same example; 0 is padding."""
    decoder_position_ids: torch.Tensor
    """int64 [micro_batch, decoder_length], from 0 in each segment; 0 on padding."""
    labels: torch.Tensor
    """int64 [micro_batch, decoder_length], the targets; where `loss_weights` is 0 it says nothing."""
    loss_weights: torch.Tensor
    """float32 [micro_batch, decoder_length], weight of each label; 0 on padding."""
    loss_positions: torch.Tensor
    """int64 [num_target_tokens], increasing: the positions with a weight, counted in [decoder_length, micro_batch], as
    the model's hidden states lie: position t of row r is t * micro_batch + r."""
    num_loss_units: int
    """What the sum of weighted losses is divided by, once summed over the global batch."""
    num_examples: int
    num_tokens: int
    """Tokens of both sides that are not padding."""
    num_target_tokens: int
    """Labels with a weight."""
    rows: tuple[EncoderDecoderRow, ...]

    @property
    def segment_ids(self) -> torch.Tensor:
        """int64 [micro_batch, decoder_length], which example a label and its loss belong to."""
        return self.decoder_segment_ids

    @property
    def pipeline_length(self) -> int:
        """Tokens of a row that travel between pipeline stages: both sides, one behind the other."""
        return self.encoder_tokens.shape[1] + self.decoder_tokens.shape[1]

    def model_inputs(self, *, with_labels: bool) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the model's forward pass."""
        names = list(TENSORS)
        names.remove("loss_weights")
        if not with_labels:
            names = [name for name in names if name not in ("labels", "loss_positions")]
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> EncoderDecoderBatch:
        """Return the batch with its tensors on `device`."""
        moved: dict[str, Any] = {name: move(getattr(self, name), device) for name in TENSORS}
        return replace(self, **moved)


def build_encoder_decoder_batch(
    rows: Sequence[EncoderDecoderRow],
    *,
    normalization: LossNormalization,
    dataset_target_tokens: NDArray[np.int64] | None = None,
) -> EncoderDecoderBatch:
    """Build a micro-batch; the worked example is in the module's docstring.

    Args:    rows: at least one, all of the same two lengths; rows of padding alone are allowed.
             dataset_target_tokens: [datasets], of the whole global batch; needed for `dataset`, and only there.
    """
    assert rows, "a micro-batch has at least one row"
    encoder_tokens = np.stack([row.encoder_tokens for row in rows]).astype(np.int64)
    encoder_segments = np.stack([row.encoder_segment_ids for row in rows]).astype(np.int64)
    labels = np.stack([row.targets for row in rows]).astype(np.int64)  # [micro_batch, decoder_length]
    decoder_segments = np.stack([row.decoder_segment_ids for row in rows]).astype(np.int64)
    predicted = decoder_segments > 0
    loss_weights, num_loss_units = weigh_targets(
        predicted,
        decoder_segments,
        normalization=normalization,
        dataset_ids=[row.dataset_ids for row in rows],
        dataset_target_tokens=dataset_target_tokens,
    )
    starts = np.array([row.decoder_start_id for row in rows], np.int64)
    return EncoderDecoderBatch(
        encoder_tokens=torch.from_numpy(encoder_tokens),
        encoder_segment_ids=torch.from_numpy(encoder_segments),
        encoder_position_ids=torch.from_numpy(segment_positions(encoder_segments)),
        decoder_tokens=torch.from_numpy(_shift_right(labels, decoder_segments, starts)),
        decoder_segment_ids=torch.from_numpy(decoder_segments),
        decoder_position_ids=torch.from_numpy(segment_positions(decoder_segments)),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        loss_positions=torch.from_numpy(np.flatnonzero(predicted.T)),
        num_loss_units=num_loss_units,
        num_examples=sum(len(row.example_ids) for row in rows),
        num_tokens=int(np.count_nonzero(encoder_segments)) + int(np.count_nonzero(predicted)),
        num_target_tokens=int(np.count_nonzero(predicted)),
        rows=tuple(rows),
    )


def _shift_right(
    labels: NDArray[np.int64], segment_ids: NDArray[np.int64], starts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Move labels one place right inside each segment, behind the start token; padding stays what it is.

    Args:    labels, segment_ids: [micro_batch, decoder_length]. starts: [micro_batch], the start token of each row.
    """
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    shifted = np.empty_like(labels)
    shifted[:, 0] = starts
    shifted[:, 1:] = np.where(same, labels[:, :-1], starts[:, None])
    return np.where(segment_ids > 0, shifted, labels)
