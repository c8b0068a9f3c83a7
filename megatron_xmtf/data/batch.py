"""Build training tensors from packed rows. No other file makes labels or loss weights.

    row of 8 tokens: example 1 with inputs [6 7] and targets [8 2], example 2 with [4] and [5 2], one of padding
    (the last token of a row is only a label)

    tokens         6    7    8    2    4    5    2
    segment_ids    1    1    1    1    2    2    2
    position_ids   0    1    2    3    0    1    2
    labels         7    8    2    4    5    2    0      next token
    predicted      0    1    1    0    1    1    0      the label is a target of the same segment
    loss_positions      1    2         4    5           where it is, row by row of [sequence, micro_batch]

    normalization                    loss_weights of the predicted    num_loss_units   meaning of one unit
    target_token                      1    1    .    1    1            4               a target token
    target_sequence                  1/2  1/2   .   1/2  1/2           2               a target
    target_sequence_per_micro_batch  1/4  1/4   .   1/4  1/4           1               a micro-batch
    dataset                          3/4  3/4   .   3/2  3/2           4               a target token, see below

The loss of a step is the sum over the global batch of loss_weights * token_loss, divided by the sum of num_loss_units
over the same global batch, so it does not depend on how rows are dealt to micro-batches and ranks, but for
target_sequence_per_micro_batch.
Invariant: sum(loss_weights) == number of predicted targets in the micro-batch for target_sequence.

dataset: each of the D datasets with a target token in the global batch weighs the same, and in it each target token. Of
T target tokens in the global batch, T_d of dataset d, each of d weighs T / (T_d D); the weights add up to T. Above, the
global batch has T = 6: four of the first example's dataset (two of them in another micro-batch), two of the second's.
A micro-batch cannot know T_d, so the counts of the whole global batch are given (`target_counts.py`).

Plain text is an example without inputs: all its tokens but the first are predicted, and the document is the unit of
target_sequence. A text of one token has nothing to predict and counts as no target.

Source:  per-target weighting, Megatron-DeepSpeed t0loading `--norm-target-loss`, which finds targets as runs of a
         flattened mask within each micro-batch; here segments decide, so neighbouring targets never merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_xmtf.data.rows import Row

__all__ = ["Batch", "LossNormalization", "build_batch"]

LossNormalization = Literal["target_token", "target_sequence", "target_sequence_per_micro_batch", "dataset"]
"""The values of `loss.normalization`."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch; tensors are [micro_batch, sequence] where nothing else is said, on CPU until `to` moves them."""

    tokens: torch.Tensor
    """int64, what the model reads."""
    labels: torch.Tensor
    """int64, the next token; where `loss_weights` is 0 it says nothing."""
    position_ids: torch.Tensor
    """int64, from 0 in each segment; 0 on padding."""
    segment_ids: torch.Tensor
    """int64, 1, 2, 3... within a row; 0 is padding. A token sees its own segment only."""
    loss_weights: torch.Tensor
    """float32, weight of each label; 0 on inputs, padding and where the label is of another segment."""
    loss_positions: torch.Tensor
    """int64 [num_target_tokens], increasing: the positions with a weight, counted in [sequence, micro_batch], as the
    model's hidden states lie: position t of row r is t * micro_batch + r. The head is computed for these alone."""
    num_loss_units: int
    """What the sum of weighted losses is divided by, once summed over the global batch."""
    num_examples: int
    num_tokens: int
    """Tokens read that are not padding."""
    num_target_tokens: int
    """Labels with a weight."""
    rows: tuple[Row, ...]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            segment_ids=self.segment_ids.to(device, non_blocking=True),
            loss_weights=self.loss_weights.to(device, non_blocking=True),
            loss_positions=self.loss_positions.to(device, non_blocking=True),
        )


def build_batch(
    rows: Sequence[Row],
    *,
    normalization: LossNormalization,
    dataset_target_tokens: NDArray[np.int64] | None = None,
) -> Batch:
    """Build a micro-batch; the worked example is in the module's docstring.

    Args:    rows: at least one, all of the same length sequence_length + 1; rows of padding alone are allowed.
             dataset_target_tokens: [datasets], of the whole global batch; needed for `dataset`, and only there.
    """
    assert rows, "a micro-batch has at least one row"
    assert (normalization == "dataset") == (dataset_target_tokens is not None), "counts are for `dataset` alone"
    tokens = np.stack([row.tokens for row in rows]).astype(np.int64)  # [micro_batch, sequence + 1]
    segment_ids = np.stack([row.segment_ids for row in rows]).astype(np.int64)
    is_target = np.stack([row.is_target for row in rows])
    same_segment = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    predicted = is_target[:, 1:] & same_segment  # [micro_batch, sequence]
    segment_ids = segment_ids[:, :-1]
    if dataset_target_tokens is not None:
        loss_weights, num_loss_units = _weigh_datasets(predicted, segment_ids, rows, dataset_target_tokens)
    else:
        loss_weights, num_loss_units = _weigh(predicted, segment_ids, normalization=normalization)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
        position_ids=torch.from_numpy(_positions(segment_ids)),
        segment_ids=torch.from_numpy(np.ascontiguousarray(segment_ids)),
        loss_weights=torch.from_numpy(loss_weights),
        loss_positions=torch.from_numpy(np.flatnonzero(predicted.T)),
        num_loss_units=num_loss_units,
        num_examples=sum(len(row.example_ids) for row in rows),
        num_tokens=int(np.count_nonzero(segment_ids)),
        num_target_tokens=int(np.count_nonzero(predicted)),
        rows=tuple(rows),
    )


def _weigh(
    predicted: NDArray[np.bool_], segment_ids: NDArray[np.int64], *, normalization: LossNormalization
) -> tuple[NDArray[np.float32], int]:
    """Return (loss_weights float32 [micro_batch, sequence], num_loss_units)."""
    if normalization == "target_token":
        return predicted.astype(np.float32), int(np.count_nonzero(predicted))
    # One number for each segment of the micro-batch: segment 2 of row 3 is 3 * (segments + 1) + 2.
    stride = int(segment_ids.max()) + 1
    targets = segment_ids + stride * np.arange(len(segment_ids))[:, None]
    target_tokens = np.bincount(targets[predicted], minlength=stride * len(segment_ids))
    num_targets = int(np.count_nonzero(target_tokens))
    weights = np.divide(1.0, target_tokens[targets], out=np.zeros(predicted.shape), where=predicted)
    if normalization == "target_sequence":
        return weights.astype(np.float32), num_targets
    return (weights / max(num_targets, 1)).astype(np.float32), 1


def _weigh_datasets(
    predicted: NDArray[np.bool_],
    segment_ids: NDArray[np.int64],
    rows: Sequence[Row],
    dataset_target_tokens: NDArray[np.int64],
) -> tuple[NDArray[np.float32], int]:
    """Return what `_weigh` does, for the normalization `dataset`."""
    # Dataset of each position; that of padding is never looked at.
    datasets = np.stack(
        [
            np.concatenate([[0], row.dataset_ids]).astype(np.int64)[segments]
            for row, segments in zip(rows, segment_ids, strict=True)
        ]
    )
    own = np.bincount(datasets[predicted], minlength=len(dataset_target_tokens))
    assert len(own) == len(dataset_target_tokens) and (own <= dataset_target_tokens).all(), (
        f"a micro-batch has {own.tolist()} target tokens by dataset, its global batch {dataset_target_tokens.tolist()}"
    )
    present = np.count_nonzero(dataset_target_tokens)
    total = dataset_target_tokens.sum()
    weights = np.divide(
        total, dataset_target_tokens[datasets] * present, out=np.zeros(predicted.shape), where=predicted
    )
    return weights.astype(np.float32), int(np.count_nonzero(predicted))


def _positions(segment_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count from 0 within each segment: segment_ids 1 1 1 2 2 0 -> 0 1 2 0 1 0."""
    places = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = np.ones(segment_ids.shape, np.bool_)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return np.where(segment_ids > 0, positions, 0)
