"""Which examples can be in a row, and what happens to those that are too long.

    row of 8 tokens   inputs  targets   drop      truncate_inputs_left      truncate_inputs_right
    example 0            3        2     kept      kept                      kept
    example 1            9        2     dropped   inputs lose their first 3 inputs lose their last 3
    example 2            4        8     dropped   dropped: no input token would be left beside the target
    text                 0        9     dropped   dropped

Whatever the policy, what is left out or cut is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.errors import DatasetError

__all__ = ["FittingExamples", "LeftOut", "LongExamples", "fit_examples", "require_examples"]

LongExamples = Literal["drop", "truncate_inputs_left", "truncate_inputs_right", "error"]


@dataclass(frozen=True)
class LeftOut:
    """Counts of different examples that are not in a row whole."""

    dropped: int = 0
    """Too long."""
    truncated: int = 0
    """Inputs cut."""
    empty: int = 0
    """Without target tokens."""

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self.dropped + other.dropped, self.truncated + other.truncated, self.empty + other.empty)


@dataclass(frozen=True)
class FittingExamples:
    """Examples of one dataset that can be in a row."""

    ids: NDArray[np.integer]
    """Ascending; uint32 where that suffices: there may be hundreds of millions."""
    lengths: NDArray[np.integer]
    """Tokens in the row, after truncation; uint16 where that suffices."""
    target_tokens: NDArray[np.integer]
    """Labels that the loss is taken over; the same type."""
    left_out: LeftOut

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, chosen: NDArray[np.bool_] | NDArray[np.integer]) -> FittingExamples:
        """Return some of these examples, with nothing left out beside them."""
        return FittingExamples(self.ids[chosen], self.lengths[chosen], self.target_tokens[chosen], LeftOut())


def fit_examples(
    dataset: ExampleDataset,
    *,
    sequence_length: int,
    long_examples: LongExamples,
    chosen: NDArray[np.bool_] | None = None,
) -> FittingExamples:
    """Apply the policy for long examples; an example without target tokens is left out and counted as empty.

    Args:    chosen: bool [examples], those that are looked at; None: all.

    Truncation keeps the whole target and at least one token of the inputs, so that every target token is predicted;
    an example whose target leaves no room for that is dropped, as is a text that is too long.
    """
    capacity = sequence_length + 1
    inputs, targets = np.asarray(dataset.input_lengths), np.asarray(dataset.target_lengths)
    lengths = inputs.astype(np.int64) + targets
    has_target, fits = targets > 0, lengths <= capacity
    looked_at = np.ones(len(lengths), np.bool_) if chosen is None else chosen
    if long_examples == "error" and not np.all(fits[looked_at]):
        _raise_too_long(dataset, lengths, looked_at, sequence_length=sequence_length)
    cut = has_target & ~fits & (inputs > 0) & (targets < capacity) & looked_at
    if not long_examples.startswith("truncate"):
        cut = np.zeros_like(cut)
    ids = np.flatnonzero(has_target & looked_at & (fits | cut))
    # The first token of a row's segment has nothing before it that could predict it.
    predicted = targets - (inputs == 0)
    small = np.min_scalar_type(capacity)
    return FittingExamples(
        ids=ids.astype(np.uint32 if len(lengths) <= np.iinfo(np.uint32).max else np.int64),
        lengths=np.minimum(lengths[ids], capacity).astype(small),
        target_tokens=predicted[ids].astype(small),
        left_out=LeftOut(
            dropped=int(np.count_nonzero(has_target & looked_at & ~fits & ~cut)),
            truncated=int(np.count_nonzero(cut)),
            empty=int(np.count_nonzero(looked_at & ~has_target)),
        ),
    )


def _raise_too_long(
    dataset: ExampleDataset, lengths: NDArray[np.int64], looked_at: NDArray[np.bool_], *, sequence_length: int
) -> None:
    too_long = np.flatnonzero((lengths > sequence_length + 1) & looked_at)
    first = int(too_long[0])
    inputs, targets = int(dataset.input_lengths[first]), int(dataset.target_lengths[first])
    raise DatasetError(
        f"dataset {dataset.name!r} ({dataset.prefix}): example {first} has {inputs} + {targets} = {inputs + targets} "
        f"tokens, a row holds {sequence_length + 1} (sequence_length + 1); {len(too_long)} of {len(lengths)} examples "
        "are too long. Raise sequence_length, or set long_examples to drop, truncate_inputs_left or "
        "truncate_inputs_right."
    )


def require_examples(dataset: ExampleDataset, examples: FittingExamples, *, sequence_length: int) -> None:
    """Refuse a part of a mixture that has nothing to give."""
    if not len(examples):
        raise DatasetError(
            f"dataset {dataset.name!r} ({dataset.prefix}) has no example for a row of {sequence_length + 1} tokens "
            f"(sequence_length + 1): {len(dataset)} examples, {examples.left_out.dropped} too long, "
            f"{examples.left_out.empty} "
            "without target. Raise sequence_length, set long_examples to truncate_inputs_left, or take other data."
        )
