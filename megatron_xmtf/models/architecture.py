"""Which architecture a config.json or a checkpoint's manifest describes: one function each, by family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_xmtf.errors import CheckpointError, nearest_names
from megatron_xmtf.models.alexatm_config import alexatm_from_hf
from megatron_xmtf.models.bloom_architecture import BloomArchitecture, bloom_from_hf
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture, t5_from_hf
from megatron_xmtf.models.split_sizes import VOCAB_DIVISOR

__all__ = [
    "VOCAB_DIVISOR",
    "Architecture",
    "BloomArchitecture",
    "EncoderDecoderArchitecture",
    "architecture_from_hf",
    "architecture_from_mapping",
]

Architecture = BloomArchitecture | EncoderDecoderArchitecture

FAMILIES: dict[str, type[BloomArchitecture] | type[EncoderDecoderArchitecture]] = {
    "bloom": BloomArchitecture,
    "mt5": EncoderDecoderArchitecture,
    "t5": EncoderDecoderArchitecture,
    "alexatm": EncoderDecoderArchitecture,
}
"""The `family` of a manifest -> its class."""
MODEL_TYPES = ("bloom", "mt5", "t5", "blenderbot")
"""The `model_type` of a config.json that is read."""


def architecture_from_mapping(values: Mapping[str, Any]) -> Architecture:
    """Rebuild an architecture from a checkpoint's manifest.

    Raises:  CheckpointError: unknown family or fields.
    """
    family = values.get("family")
    if family not in FAMILIES:
        raise CheckpointError(f"model family {family!r} is not known; known: {', '.join(FAMILIES)}.")
    try:
        return FAMILIES[family](**values)
    except TypeError as error:
        raise CheckpointError(f"the checkpoint's architecture {dict(values)} does not fit: {error}.") from error


def architecture_from_hf(config: Mapping[str, Any], *, head_differs: bool | None = None) -> Architecture:
    """Read an architecture from the contents of a Hugging Face config.json.

    Args:    head_differs: whether the files hold an output layer that is not the embedding again; None where only
             the config.json is at hand (`encoder_decoder_architecture.t5_from_hf` says what it is for).
    Raises:  CheckpointError: unknown `model_type`, or what the family's own reader says.
    """
    model_type = config.get("model_type")
    if model_type == "bloom":
        return bloom_from_hf(config)
    if model_type in ("mt5", "t5"):
        return t5_from_hf(config, head_differs=head_differs)
    if model_type == "blenderbot":
        return alexatm_from_hf(config)
    raise CheckpointError(
        f"config.json: model_type {model_type!r} has no family here; {nearest_names(str(model_type), MODEL_TYPES)}."
    )
