"""Which examples can be in a row, and what happens to those that are too long.

    row of 8 tokens   inputs  targets   drop      truncate_inputs_left      truncate_inputs_right
    example 0            3        2     kept      kept                      kept
    example 1            9        2     dropped   inputs lose their first 3 inputs lose their last 3
    example 2            4        8     dropped   dropped: no input token would be left beside the target
    text                 0        9     dropped   dropped

    encoder 8, decoder 4 tokens, inputs end with EOS
    example 0            7        4     kept      kept: 7 + EOS             kept
    example 1            9        2     dropped   inputs lose their first 2 inputs lose their last 2; EOS is kept
    example 2            4        5     dropped   dropped: a target is never cut

Whatever the policy, what is left out or cut is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths, row_capacity, word_lengths
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.errors import DatasetError

__all__ = [
    "FittingExamples",
    "LeftOut",
    "LongExamples",
    "encoder_ends",
    "fit_examples",
    "require_examples",
    "segment_tokens",
]

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
    """Labels that the loss is taken over; the same type. In rows of two sides they are the decoder's tokens, and the
    encoder's are `lengths - target_tokens`."""
    left_out: LeftOut
    input_ends: int = 0
    """Tokens that rows put behind the inputs of each, counted in `lengths`: 1 where EOS ends an encoder's inputs."""

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, chosen: NDArray[np.bool_] | NDArray[np.integer]) -> FittingExamples:
        """Return some of these examples, with nothing left out beside them."""
        return FittingExamples(
            self.ids[chosen], self.lengths[chosen], self.target_tokens[chosen], LeftOut(), self.input_ends
        )


def segment_tokens(
    dataset: ExampleDataset,
    examples: NDArray[np.integer],
    *,
    lengths: RowLengths,
    places: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens that examples have in a row, where they have been found to fit, and their predicted targets.

    Args:    examples: numbers of examples. places: where they stand in the packing index; without, targets that are cut
             elsewhere at each place (`ObjectiveRule.cut_moves`) are those of one of them.
    Returns: (tokens of both inputs and targets, after truncation; labels that the loss is taken over), int64 [n].
    """
    if places is None:
        inputs = np.asarray(dataset.input_lengths[examples], np.int64)
        targets = np.asarray(dataset.target_lengths[examples], np.int64)
    else:
        inputs, targets = dataset.occurrence_lengths(examples, places)
    if isinstance(lengths, EncoderDecoderLengths):
        on_encoder = np.minimum(inputs + encoder_ends(dataset, lengths), lengths.encoder_length)
        return on_encoder + targets, targets
    capacity = row_capacity(lengths)
    # Without an input token that is left, the first target has nothing before it that could predict it.
    has_inputs = inputs > np.maximum(inputs + targets - capacity, 0)
    return np.minimum(inputs + targets, capacity), np.maximum(targets - ~has_inputs, 0)


def encoder_ends(dataset: ExampleDataset, lengths: EncoderDecoderLengths) -> int:
    """Return how many tokens are put behind inputs: 1 where they should end with EOS and do not yet, else 0."""
    return int(lengths.encoder_eos and not dataset.inputs_end_with_eos)


def fit_examples(
    dataset: ExampleDataset,
    *,
    sequence_length: RowLengths,
    long_examples: LongExamples,
    chosen: NDArray[np.bool_] | None = None,
) -> FittingExamples:
    """Apply the policy for long examples; an example without target tokens is left out and counted as empty.

    Args:    sequence_length: of a decoder's rows, or both lengths of an encoder-decoder's.
             chosen: bool [examples], those that are looked at; None: all.

    Truncation keeps the whole target and at least one token of the inputs, so that every target token is predicted;
    an example whose target leaves no room for that is dropped, as is a text that is too long. An encoder-decoder's
    example without inputs is left out and counted as empty too, unless EOS gives its encoder a token to read.
    Raises:  DatasetError: an example is too long under `error`; texts without an objective for an encoder-decoder.
    """
    two_sided = isinstance(sequence_length, EncoderDecoderLengths)
    capacity = row_capacity(sequence_length)
    inputs, targets = np.asarray(dataset.input_lengths), np.asarray(dataset.target_lengths)
    has_target = targets > 0
    if isinstance(sequence_length, EncoderDecoderLengths):
        _require_pairs(dataset)
        on_encoder = inputs.astype(np.int64) + encoder_ends(dataset, sequence_length)
        has_target &= on_encoder > 0
        targets_fit = targets <= sequence_length.decoder_length
        fits = targets_fit & (on_encoder <= sequence_length.encoder_length)
        can_cut = targets_fit
    else:
        fits = inputs.astype(np.int64) + targets <= capacity
        can_cut = (inputs > 0) & (targets < capacity)
    looked_at = np.ones(len(targets), np.bool_) if chosen is None else chosen
    if long_examples == "error" and not np.all(fits[looked_at]):
        _raise_too_long(dataset, ~fits & looked_at, lengths=sequence_length)
    cut = has_target & ~fits & can_cut & looked_at
    if not long_examples.startswith("truncate"):
        cut = np.zeros_like(cut)
    ids = np.flatnonzero(has_target & looked_at & (fits | cut))
    tokens, predicted = segment_tokens(dataset, ids, lengths=sequence_length)
    assert not two_sided or np.all(predicted < tokens), "every example of an encoder-decoder has inputs"
    small = np.min_scalar_type(capacity)
    return FittingExamples(
        ids=ids.astype(np.uint32 if len(targets) <= np.iinfo(np.uint32).max else np.int64),
        lengths=tokens.astype(small),
        target_tokens=predicted.astype(small),
        left_out=LeftOut(
            dropped=int(np.count_nonzero(has_target & looked_at & ~fits & ~cut)),
            truncated=int(np.count_nonzero(cut)),
            empty=int(np.count_nonzero(looked_at & ~has_target)),
        ),
        input_ends=encoder_ends(dataset, sequence_length) if isinstance(sequence_length, EncoderDecoderLengths) else 0,
    )


def _require_pairs(dataset: ExampleDataset) -> None:
    if dataset.kind == "text":
        raise DatasetError(
            f"dataset {dataset.name!r} ({dataset.prefix}) holds texts, which give an encoder nothing to read; say with "
            "`objective` what is made of them (span_corruption, alexatm_denoising, causal, prefix_lm)."
        )


def _raise_too_long(dataset: ExampleDataset, too_long: NDArray[np.bool_], *, lengths: RowLengths) -> None:
    first = int(np.argmax(too_long))
    inputs, targets = int(dataset.input_lengths[first]), int(dataset.target_lengths[first])
    keys = "encoder_length or decoder_length" if isinstance(lengths, EncoderDecoderLengths) else "sequence_length"
    raise DatasetError(
        f"dataset {dataset.name!r} ({dataset.prefix}): example {first} has {inputs} + {targets} = {inputs + targets} "
        f"tokens, a row holds {word_lengths(lengths)}; {np.count_nonzero(too_long)} of {len(too_long)} examples are "
        f"too long. Raise {keys}, or set long_examples to drop, truncate_inputs_left or truncate_inputs_right."
    )


def require_examples(dataset: ExampleDataset, examples: FittingExamples, *, sequence_length: RowLengths) -> None:
    """Refuse a part of a mixture that has nothing to give."""
    if not len(examples):
        raise DatasetError(
            f"dataset {dataset.name!r} ({dataset.prefix}) has no example for a row of {word_lengths(sequence_length)}: "
            f"{len(dataset)} examples, {examples.left_out.dropped} too long, {examples.left_out.empty} without target. "
            "Make rows longer, set long_examples to truncate_inputs_left, or take other data."
        )
