"""Encode inputs once and run the decoder on them as often as is asked; through the same pipeline schedules.

    pass        travels between stages    what each chunk with decoder layers does
    first       [enc; dec]                keeps the encoder's output of each micro-batch, by its number
    later ones  dec alone                 its decoder layers, with what it kept

The encoder's output is where it is needed after the first pass: every stage behind the encoder's last layer carries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch

__all__ = ["CachedBatch", "EncoderCache", "cache_encoder"]


@dataclass(frozen=True)
class CachedBatch(EncoderDecoderBatch):
    """A micro-batch of one number: its encoder side is the same in every pass, its decoder side is not."""

    number: int
    """Under which the encoder's output is kept."""
    is_first: bool
    """Whether inputs are encoded in this pass."""

    @staticmethod
    def of(batch: EncoderDecoderBatch, *, number: int, is_first: bool) -> CachedBatch:
        """Give a micro-batch its number."""
        values = {field.name: getattr(batch, field.name) for field in fields(EncoderDecoderBatch)}
        return CachedBatch(**values, number=number, is_first=is_first)

    @property
    def pipeline_length(self) -> int:
        """Tokens of a row that travel between pipeline stages."""
        return super().pipeline_length if self.is_first else self.decoder_tokens.shape[1]

    def model_inputs(self, *, with_labels: bool) -> dict[str, Any]:
        """Return the keyword arguments of `EncoderCache.forward`."""
        inputs = super().model_inputs(with_labels=with_labels)
        return {"number": self.number, "is_first": self.is_first, "inputs": inputs}


class EncoderCache(nn.Module):
    """A model chunk that keeps what was encoded.

    Args:  module: a chunk of `build_model`, wrapped for a precision or not.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.chunk: Any = unwrap_model(module)
        self.encoded: dict[int, Tensor] = {}
        """Number of a micro-batch -> [encoder_length, b, h] in the model's type."""

    @property
    def architecture(self) -> Any:
        """The whole model's."""
        return self.chunk.architecture

    def forward(self, *, number: int, is_first: bool, inputs: dict[str, Tensor]) -> Tensor:
        """Run the whole chunk in the first pass of a micro-batch, its decoder alone in later ones.

        Args:    inputs: of `EncoderDecoderBatch.model_inputs`.
        Returns: as `EncoderDecoderModel.forward` and `EncoderDecoderModel.decode`.
        """
        if is_first:
            return self._encode(number, inputs)
        decoder_inputs = {
            name: value for name, value in inputs.items() if name not in ("encoder_tokens", "encoder_position_ids")
        }
        output: Tensor = self.chunk.decode(**decoder_inputs, encoded=self.encoded.get(number))
        return output.float() if self.chunk.post_process else output

    def _encode(self, number: int, inputs: dict[str, Tensor]) -> Tensor:
        if not len(self.chunk.decoder.layers):
            output: Tensor = self.module(**inputs)
            return output

        def keep(module: nn.Module, arguments: Any, encoded: Tensor) -> None:
            self.encoded[number] = encoded

        hook = self.chunk.encoder.register_forward_hook(keep)
        try:
            output = self.module(**inputs)
        finally:
            hook.remove()
        return output


def cache_encoder(chunks: Sequence[nn.Module]) -> list[nn.Module]:
    """Wrap the chunks of a rank; what they keep is freed with the wrappers."""
    return [EncoderCache(chunk) for chunk in chunks]
