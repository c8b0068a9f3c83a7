"""Show examples and packed rows as they are trained on: through `PackedRows` and `build_batch`, as training does.

row 17: 2 segments, 12 of 17 tokens
  1  xcopa  sw  example 1,203    inputs 4, targets 2, loss weight of each 0.5
       Mtu·│alilala│...│[[·amechoka│</s>]]
  2  ...
  padding 5 tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.batch import LossNormalization, build_batch
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import encoder_ends
from megatron_xmtf.data.loader import AnyRows, read_micro_batch
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.data.target_counts import count_target_tokens
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.report.marked_tokens import Piece, mark_pieces, split_pieces

__all__ = ["ShownRow", "ShownSegment", "example_loss", "show_row", "word_row", "word_tokens"]

SHOWN_COLUMNS = ("dataset", "config", "language", "template", "template_language", "task")
INDENT = " " * 7


class ShownSegment(TypedDict):
    """One segment of a row."""

    segment: int
    """Its number in `segment_ids`, from 1."""
    entry: str
    """Name of the indexed dataset."""
    example: int
    """Number in that dataset."""
    columns: dict[str, str]
    """What is known of the example: dataset, language, template ..."""
    ids: list[int]
    num_inputs: int
    """The first tokens are inputs, the others targets."""
    cut_inputs: int
    """Tokens of the inputs that were cut off to fit the row."""
    loss_weights: list[float]
    """For each token of `ids`, its weight as a label, before the division by the global batch's loss units."""
    text: list[str] | None
    """Pieces of text, of one token or of a few that are characters only together; None without a tokenizer."""


class ShownRow(TypedDict):
    """One row."""

    row: int
    tokens: int
    capacity: int
    """sequence_length + 1, or encoder_length + decoder_length."""
    padding: int
    normalization: str | None
    """None where no configuration says: then every weight is 0 or 1."""
    segments: list[ShownSegment]
    encoder_tokens: NotRequired[int]
    """Of rows of two sides: tokens on the encoder's, EOS included; the others are the decoder's labels."""
    encoder_length: NotRequired[int]
    decoder_length: NotRequired[int]


_Half = tuple[list[int], int, list[float]]
"""Ids of a segment, inputs then targets; how many of them are inputs; the loss weight of each."""


def example_loss(inputs: Sequence[int], targets: Sequence[int]) -> list[bool]:
    """Tell for each token of an example, inputs then targets, whether loss is taken on it: packed alone in a row."""
    count = len(inputs) + len(targets)
    if not targets or not count - 1:
        return [False] * count
    (row,) = pack_examples([(inputs, targets)], sequence_length=count - 1, pad_id=0)
    batch = build_batch([row], normalization="target_token")
    return [False, *(weight > 0 for weight in batch.loss_weights[0].tolist())]


def show_row(
    rows: AnyRows,
    number: int,
    *,
    tokenizer: Tokenizer | None,
    normalization: LossNormalization | None,
    micro_batch_size: int,
    step_rows: StepRows,
) -> ShownRow:
    """Describe one row.

    Args:    normalization: of the run; None: weights are 0 or 1. micro_batch_size: rows of a micro-batch; the weights
             of `target_sequence_per_micro_batch` depend on the rows beside it. step_rows: of the run; the weights of
             `dataset` depend on all rows of the step.
    Raises:  IndexError: there is no such row. DatasetError: as `PackedRows`.
    """
    first = number // micro_batch_size * micro_batch_size
    together = range(first, min(first + micro_batch_size, len(rows)))
    counts = None
    if normalization == "dataset":
        step = step_rows.step_of(number)
        begin = step_rows.before(step)
        counts = count_target_tokens(rows, begin, count=min(step_rows.of(step), len(rows) - begin))
    batch = read_micro_batch(rows, together, normalization=normalization or "target_token", counts=counts)
    row, weights = batch.rows[number - first], batch.loss_weights[number - first].tolist()
    if isinstance(row, EncoderDecoderRow):
        halves = _halves_of_sides(row, weights)
    else:
        halves = _halves_of_line(row, [0.0, *weights])
    segments = [
        _show_segment(rows, row, place, half, cut_at=rows.index.row_lengths, tokenizer=tokenizer)
        for place, half in enumerate(halves)
    ]
    used = sum(len(segment["ids"]) for segment in segments)
    shown: ShownRow = {
        "row": number,
        "tokens": used,
        "capacity": rows.index.capacity,
        "padding": rows.index.capacity - used,
        "normalization": normalization,
        "segments": segments,
    }
    if isinstance(row, EncoderDecoderRow):
        shown["encoder_tokens"] = sum(segment["num_inputs"] for segment in segments)
        shown["encoder_length"], shown["decoder_length"] = len(row.encoder_tokens), len(row.targets)
    return shown


def _halves_of_line(row: Row, weights: Sequence[float]) -> list[_Half]:
    """Return (ids, number of inputs, loss weights) of each segment of one line."""
    halves = []
    for segment in range(1, len(row.example_ids) + 1):
        inside = row.segment_ids == segment
        own = [weight for weight, is_own in zip(weights, inside.tolist(), strict=True) if is_own]
        halves.append((row.tokens[inside].tolist(), int((inside & ~row.is_target).sum()), own))
    return halves


def _halves_of_sides(row: EncoderDecoderRow, weights: Sequence[float]) -> list[_Half]:
    """Return the same of two sides: the encoder's tokens, then the decoder's labels."""
    halves = []
    for segment in range(1, len(row.example_ids) + 1):
        inputs = row.encoder_tokens[row.encoder_segment_ids == segment].tolist()
        inside = row.decoder_segment_ids == segment
        own = [weight for weight, is_own in zip(weights, inside.tolist(), strict=True) if is_own]
        halves.append((inputs + row.targets[inside].tolist(), len(inputs), [0.0] * len(inputs) + own))
    return halves


def _show_segment(
    rows: AnyRows,
    row: Row | EncoderDecoderRow,
    place: int,
    half: _Half,
    *,
    cut_at: RowLengths,
    tokenizer: Tokenizer | None,
) -> ShownSegment:
    ids, num_inputs, own_weights = half
    dataset, example = rows.datasets[int(row.dataset_ids[place])], int(row.example_ids[place])
    pieces = _pieces(ids, [weight > 0 for weight in own_weights], num_inputs, tokenizer)
    return {
        "segment": place + 1,
        "entry": dataset.name,
        "example": example,
        "columns": example_columns(dataset, example),
        "ids": ids,
        "num_inputs": num_inputs,
        # Targets are whole, and where they begin may be this row's own (`ObjectiveRule.cut_moves`).
        "cut_inputs": int(dataset.input_lengths[example])
        + int(dataset.target_lengths[example])
        + (encoder_ends(dataset, cut_at) if isinstance(cut_at, EncoderDecoderLengths) else 0)
        - len(ids),
        "loss_weights": own_weights,
        "text": None if pieces is None else [piece.text for piece in pieces],
    }


def example_columns(dataset: ExampleDataset, example: int) -> dict[str, str]:
    """Return what the columns say of an example; what it does not say is left out."""
    found = {}
    for name in SHOWN_COLUMNS:
        values = dataset.column(name) if name in dataset.column_names else None
        if values is not None and dataset.names(name)[int(values[example])]:
            found[name] = dataset.names(name)[int(values[example])]
    return found


def _pieces(
    ids: Sequence[int], has_loss: Sequence[bool], num_inputs: int, tokenizer: Tokenizer | None
) -> list[Piece] | None:
    if tokenizer is None:
        return None
    return split_pieces(ids, has_loss, decode=tokenizer.decode, breaks=[num_inputs])


def word_tokens(
    ids: Sequence[int],
    has_loss: Sequence[bool],
    *,
    num_inputs: int,
    tokenizer: Tokenizer | None,
    colour: bool,
    indent: str = INDENT,
) -> str:
    """Word tokens, decoded or, without a tokenizer, as numbers; lines after the first are indented."""
    pieces = _pieces(ids, has_loss, num_inputs, tokenizer)
    if pieces is None:
        pieces = [Piece(str(token), (token,), marked) for token, marked in zip(ids, has_loss, strict=True)]
    return mark_pieces(pieces, colour=colour).replace("\n", f"\n{indent}")


def word_row(shown: ShownRow, *, tokenizer: Tokenizer | None, colour: bool, show_ids: bool) -> str:
    """Word a row for a person."""
    predicted = sum(weight > 0 for segment in shown["segments"] for weight in segment["loss_weights"])
    lines = [
        f"row {shown['row']:,}: {len(shown['segments']):,} segments, {shown['tokens']:,} of {shown['capacity']:,} "
        f"tokens ({100 * shown['tokens'] / shown['capacity']:.1f} %), {predicted:,} of them with loss"
    ]
    if "encoder_tokens" in shown:
        inputs, targets = shown["encoder_tokens"], shown["tokens"] - shown["encoder_tokens"]
        lines.append(
            f"       encoder {inputs:,} of {shown['encoder_length']:,} tokens "
            f"({100 * inputs / shown['encoder_length']:.1f} %), decoder {targets:,} of {shown['decoder_length']:,} "
            f"({100 * targets / shown['decoder_length']:.1f} %)"
        )
    for segment in shown["segments"]:
        about = [segment["entry"], *(f"{value}" for value in dict.fromkeys(segment["columns"].values()))]
        targets = len(segment["ids"]) - segment["num_inputs"]
        cut = f" ({segment['cut_inputs']:,} more were cut off)" if segment["cut_inputs"] else ""
        weights = sorted({weight for weight in segment["loss_weights"] if weight})
        weighed = f", loss weight {weights[0]:.4g} a token" if weights and shown["normalization"] else ""
        lines.append(
            f"  {segment['segment']:>3}  {'  '.join(dict.fromkeys(about))}  example {segment['example']:,}:  "
            f"inputs {segment['num_inputs']:,}{cut}, targets {targets:,}{weighed}"
        )
        if show_ids:
            lines.append(f"{INDENT}{' '.join(map(str, segment['ids']))}")
        has_loss = [weight > 0 for weight in segment["loss_weights"]]
        words = word_tokens(
            segment["ids"], has_loss, num_inputs=segment["num_inputs"], tokenizer=tokenizer, colour=colour
        )
        lines.append(f"{INDENT}{words}")
    lines.append(f"       padding: {shown['padding']:,} tokens")
    return "\n".join(lines)
