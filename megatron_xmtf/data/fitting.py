"""Which examples can be in a row, and what happens to those that are too long.

    row of 8 tokens   inputs  targets   drop      truncate_inputs_left      truncate_inputs_right
    example 0            3        2     kept      kept                      kept
    example 1            9        2     dropped   inputs lose their first 3 inputs lose their last 3
    example 2            4        8     dropped   dropped: no input token would be left beside the target
    text                 0        9     dropped   dropped

Whatever the policy, what is left out or cut is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.errors import ConfigError, DatasetError

__all__ = ["FittingExamples", "LongExamples", "fit_examples", "require_examples"]

LongExamples = Literal["drop", "truncate_inputs_left", "truncate_inputs_right", "error"]


@dataclass(frozen=True)
class FittingExamples:
    """The examples of one dataset that can be in a row."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int32]
    """Tokens in the row, after truncation."""
    target_tokens: NDArray[np.int32]
    """Labels that the loss is taken over."""
    dropped: int
    truncated: int
    empty: int


def fit_examples(dataset: ExampleDataset, *, sequence_length: int, long_examples: LongExamples) -> FittingExamples:
    """Apply the policy for long examples; an example without target tokens is left out and counted as empty.

    Truncation keeps the whole target and at least one token of the inputs, so that every target token is predicted;
    an example whose target leaves no room for that is dropped, as is a text that is too long.
    """
    capacity = sequence_length + 1
    inputs, targets = np.asarray(dataset.input_lengths), np.asarray(dataset.target_lengths)
    lengths = inputs.astype(np.int64) + targets
    has_target, fits = targets > 0, lengths <= capacity
    if long_examples == "error" and not np.all(fits):
        _raise_too_long(dataset, lengths, sequence_length=sequence_length)
    cut = has_target & ~fits & (inputs > 0) & (targets < capacity)
    if not long_examples.startswith("truncate"):
        cut = np.zeros_like(cut)
    ids = np.flatnonzero(has_target & (fits | cut))
    # The first token of a row's segment has nothing before it that could predict it.
    predicted = targets - (inputs == 0)
    return FittingExamples(
        ids=ids,
        lengths=np.minimum(lengths[ids], capacity).astype(np.int32),
        target_tokens=predicted[ids].astype(np.int32),
        dropped=int(np.count_nonzero(has_target & ~fits & ~cut)),
        truncated=int(np.count_nonzero(cut)),
        empty=int(np.count_nonzero(~has_target)),
    )


def _raise_too_long(dataset: ExampleDataset, lengths: NDArray[np.int64], *, sequence_length: int) -> None:
    too_long = np.flatnonzero(lengths > sequence_length + 1)
    first = int(too_long[0])
    inputs, targets = int(dataset.input_lengths[first]), int(dataset.target_lengths[first])
    raise DatasetError(
        f"dataset {dataset.name!r} ({dataset.prefix}): example {first} has {inputs} + {targets} = {inputs + targets} "
        f"tokens, a row holds {sequence_length + 1} (sequence_length + 1); {len(too_long)} of {len(lengths)} examples "
        "are too long. Raise sequence_length, or set long_examples to drop, truncate_inputs_left or "
        "truncate_inputs_right."
    )


def require_examples(
    datasets: Sequence[ExampleDataset],
    fitting: Sequence[FittingExamples],
    *,
    weights: Sequence[float] | None,
    sequence_length: int,
) -> None:
    """Refuse a mixture that could never fill a row, and a share of a dataset that has nothing to give."""
    if len(datasets) > np.iinfo(np.uint16).max:
        raise ConfigError(f"{len(datasets)} datasets in one mixture; at most 65535 can be indexed. Merge some.")
    remedy = "Raise sequence_length, set long_examples to truncate_inputs_left, or take other data."
    for dataset, examples in zip(datasets, fitting, strict=True):
        if not len(examples.ids) and (weights is not None or len(datasets) == 1):
            raise DatasetError(
                f"dataset {dataset.name!r} ({dataset.prefix}) has no example for a row of {sequence_length + 1} tokens "
                f"(sequence_length + 1): {len(dataset)} examples, {examples.dropped} too long, {examples.empty} "
                f"without target. {remedy}"
            )
    if not any(len(examples.ids) for examples in fitting):
        raise DatasetError(
            f"none of the {sum(len(dataset) for dataset in datasets)} examples of {len(datasets)} datasets fits a row "
            f"of {sequence_length + 1} tokens (sequence_length + 1). {remedy}"
        )
