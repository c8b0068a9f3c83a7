"""Build training tensors from packed rows. No other file makes labels or loss weights.

    row of 8 tokens: example 1 with inputs [6 7] and targets [8 2], example 2 with [4] and [5 2], one of padding
    (the last token of a row is only a label)

    tokens         6    7    8    2    4    5    2
    segment_ids    1    1    1    1    2    2    2
    position_ids   0    1    2    3    0    1    2
    labels         7    8    2    4    5    2    0      next token
    predicted      0    1    1    0    1    1    0      the label is a target of the same segment
    loss_positions      1    2         4    5           where it is, row by row of [sequence, micro_batch]
    prefix_mask    1    1    0    0    1    0    0      prefix-LM alone: inputs, seen by all of their example

    loss_weights of the predicted, `target_sequence`: 1/2 1/2 . 1/2 1/2 (the other normalisations: `loss_weights.py`)

The loss of a step is the sum over the global batch of loss_weights * token_loss, divided by the sum of num_loss_units
over the same global batch, so it does not depend on how rows are dealt to micro-batches and ranks, but for
target_sequence_per_micro_batch.

Plain text is an example without inputs: all its tokens but the first are predicted, and the document is the unit of
target_sequence. A text of one token has nothing to predict and counts as no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_xmtf.data.loss_weights import LossNormalization, segment_positions, weigh_targets
from megatron_xmtf.data.rows import Row

__all__ = ["Batch", "LossNormalization", "build_batch", "move"]


def move(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor on `device`; on its way to a GPU through page-locked memory, so that nothing waits.

    From other memory CUDA copies more than 64 KiB only when all that the GPU was given before is done: each micro-batch
    would wait for the one before it. torch keeps the page-locked copy until the GPU has read it.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
    prefix_mask: torch.Tensor | None
    """bool, inputs of an example, which all of its tokens see, also those before (prefix-LM); False on targets, texts
    and padding. None: attention is causal."""
    num_loss_units: int
    """What the sum of weighted losses is divided by, once summed over the global batch."""
    num_examples: int
    num_tokens: int
    """Tokens read that are not padding."""
    num_target_tokens: int
    """Labels with a weight."""
    rows: tuple[Row, ...]

    @property
    def pipeline_length(self) -> int:
        """Tokens of a row that travel between pipeline stages."""
        return self.tokens.shape[1]

    def model_inputs(self, *, with_labels: bool) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the model's forward pass."""
        inputs = {"tokens": self.tokens, "segment_ids": self.segment_ids}
        if self.prefix_mask is not None:
            inputs["prefix_mask"] = self.prefix_mask
        if with_labels:
            inputs |= {"labels": self.labels, "loss_positions": self.loss_positions}
        return inputs

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            tokens=move(self.tokens, device),
            labels=move(self.labels, device),
            position_ids=move(self.position_ids, device),
            segment_ids=move(self.segment_ids, device),
            loss_weights=move(self.loss_weights, device),
            loss_positions=move(self.loss_positions, device),
            prefix_mask=None if self.prefix_mask is None else move(self.prefix_mask, device),
        )


def build_batch(
    rows: Sequence[Row],
    *,
    normalization: LossNormalization,
    dataset_target_tokens: NDArray[np.int64] | None = None,
    prefix_lm: bool = False,
) -> Batch:
    """Build a micro-batch; the worked example is in the module's docstring.

    Args:    rows: at least one, all of the same length sequence_length + 1; rows of padding alone are allowed.
             dataset_target_tokens: [datasets], of the whole global batch; needed for `dataset`, and only there.
             prefix_lm: let the inputs of an example be seen by all of it.
    """
    assert rows, "a micro-batch has at least one row"
    tokens = np.stack([row.tokens for row in rows]).astype(np.int64)  # [micro_batch, sequence + 1]
    segment_ids = np.stack([row.segment_ids for row in rows]).astype(np.int64)
    is_target = np.stack([row.is_target for row in rows])
    same_segment = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    predicted = is_target[:, 1:] & same_segment  # [micro_batch, sequence]
    segment_ids = segment_ids[:, :-1]
    prefix_mask = (segment_ids > 0) & ~is_target[:, :-1]
    loss_weights, num_loss_units = weigh_targets(
        predicted,
        segment_ids,
        normalization=normalization,
        dataset_ids=[row.dataset_ids for row in rows],
        dataset_target_tokens=dataset_target_tokens,
    )
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
        position_ids=torch.from_numpy(segment_positions(segment_ids)),
        segment_ids=torch.from_numpy(np.ascontiguousarray(segment_ids)),
        loss_weights=torch.from_numpy(loss_weights),
        loss_positions=torch.from_numpy(np.flatnonzero(predicted.T)),
        prefix_mask=torch.from_numpy(prefix_mask) if prefix_lm else None,
        num_loss_units=num_loss_units,
        num_examples=sum(len(row.example_ids) for row in rows),
        num_tokens=int(np.count_nonzero(segment_ids)),
        num_target_tokens=int(np.count_nonzero(predicted)),
        rows=tuple(rows),
    )
