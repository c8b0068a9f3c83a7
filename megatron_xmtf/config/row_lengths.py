"""How many tokens a row holds: one line of a decoder, or two sides of an encoder-decoder.

                 a decoder, sequence_length 2048      an encoder-decoder, 1024 and 256
RowLengths       2048                                 EncoderDecoderLengths(1024, 256)
row_capacity     2049, one more for the last label    1280
an example fits  inputs + targets <= 2049             inputs + EOS <= 1024 and targets <= 256
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EncoderDecoderLengths", "RowLengths", "row_capacity", "word_lengths"]


@dataclass(frozen=True)
class EncoderDecoderLengths:
    """Tokens of the two sides of a row."""

    encoder_length: int
    decoder_length: int
    encoder_eos: bool = True
    """Whether the inputs of each example end with EOS, which takes a token of the encoder's side."""


RowLengths = int | EncoderDecoderLengths
"""`sequence_length` of a decoder, or the two lengths of an encoder-decoder."""


def row_capacity(lengths: RowLengths) -> int:
    """Return the tokens of examples that a row can hold."""
    if isinstance(lengths, EncoderDecoderLengths):
        return lengths.encoder_length + lengths.decoder_length
    return lengths + 1


def word_lengths(lengths: RowLengths) -> str:
    """Say what a row can hold, and which settings decide it."""
    if isinstance(lengths, EncoderDecoderLengths):
        inputs = f"{lengths.encoder_length} tokens of inputs{' and their EOS' if lengths.encoder_eos else ''}"
        return f"{inputs} (encoder_length) and {lengths.decoder_length} of targets (decoder_length)"
    return f"{lengths + 1} tokens (sequence_length + 1)"
