"""Weigh the predicted tokens of a micro-batch: the four normalisations of a loss, for one line and for two sides.

    predicted      0    1    1    0    1    1    0      segments 1 1 1 1 2 2 2; the label is a target of the segment

    normalization                    loss_weights of the predicted    num_loss_units   meaning of one unit
    target_token                      1    1    .    1    1            4               a target token
    target_sequence                  1/2  1/2   .   1/2  1/2           2               a target
    target_sequence_per_micro_batch  1/4  1/4   .   1/4  1/4           1               a micro-batch
    dataset                          3/4  3/4   .   3/2  3/2           4               a target token, see below

dataset: each of the D datasets with a target token in the global batch weighs the same, and in it each target token. Of
T target tokens in the global batch, T_d of dataset d, each of d weighs T / (T_d D); the weights add up to T. Above, the
global batch has T = 6: four of the first example's dataset (two of them in another micro-batch), two of the second's.
A micro-batch cannot know T_d, so the counts of the whole global batch are given (`target_counts.py`).

Invariant: sum(loss_weights) == number of predicted targets in the micro-batch for target_sequence.
Source:  per-target weighting, Megatron-DeepSpeed t0loading `--norm-target-loss`, which finds targets as runs of a
         flattened mask within each micro-batch; here segments decide, so neighbouring targets never merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["LossNormalization", "segment_positions", "weigh_targets"]

LossNormalization = Literal["target_token", "target_sequence", "target_sequence_per_micro_batch", "dataset"]
"""The values of `loss.normalization`."""


def weigh_targets(
    predicted: NDArray[np.bool_],
    segment_ids: NDArray[np.int64],
    *,
    normalization: LossNormalization,
    dataset_ids: Sequence[NDArray[np.uint16]],
    dataset_target_tokens: NDArray[np.int64] | None,
) -> tuple[NDArray[np.float32], int]:
    """Weigh the labels of a micro-batch.

    Args:    predicted: [micro_batch, sequence], whether the loss is taken of the label. segment_ids: the same shape.
             dataset_ids: of each row, dataset of segment n at n - 1. dataset_target_tokens: [datasets], of the whole
             global batch; needed for `dataset`, and only there.
    Returns: (loss_weights float32 [micro_batch, sequence], num_loss_units).
    """
    assert (normalization == "dataset") == (dataset_target_tokens is not None), "counts are for `dataset` alone"
    if dataset_target_tokens is not None:
        return _weigh_datasets(predicted, segment_ids, dataset_ids, dataset_target_tokens)
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
    dataset_ids: Sequence[NDArray[np.uint16]],
    dataset_target_tokens: NDArray[np.int64],
) -> tuple[NDArray[np.float32], int]:
    """Return what `weigh_targets` does, for the normalization `dataset`."""
    # Dataset of each position; that of padding is never looked at.
    datasets = np.stack(
        [
            np.concatenate([[0], ids]).astype(np.int64)[segments]
            for ids, segments in zip(dataset_ids, segment_ids, strict=True)
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


def segment_positions(segment_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count from 0 within each segment: segment_ids 1 1 1 2 2 0 -> 0 1 2 0 1 0."""
    places = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = np.ones(segment_ids.shape, np.bool_)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return np.where(segment_ids > 0, positions, 0)
