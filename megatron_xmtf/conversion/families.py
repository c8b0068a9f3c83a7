"""Which table of parameters an architecture has."""

from __future__ import annotations

from megatron_xmtf.conversion.alexatm_mapping import alexatm_mapping
from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
from megatron_xmtf.conversion.mapping import FamilyMapping
from megatron_xmtf.conversion.t5_mapping import t5_mapping
from megatron_xmtf.models.architecture import Architecture
from megatron_xmtf.models.bloom_architecture import BloomArchitecture

__all__ = ["mapping_of"]


def mapping_of(architecture: Architecture) -> FamilyMapping:
    """Return the parameters of a model.

    Raises:  CheckpointError: `transformers` has no model that computes the same; names what differs.
    """
    if isinstance(architecture, BloomArchitecture):
        return bloom_mapping(architecture)
    if architecture.family in ("mt5", "t5"):
        return t5_mapping(architecture)
    return alexatm_mapping(architecture)
