"""Read single fields of a Hugging Face config.json; each is checked, and a wrong one is named with its value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_xmtf.errors import CheckpointError

__all__ = ["read_fraction", "read_size", "read_token_id"]


def read_size(config: Mapping[str, Any], *names: str) -> int:
    """Read a positive integer under the first of its names that holds one.

    Raises:  CheckpointError: none does.
    """
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise CheckpointError(f"config.json has no positive integer {' or '.join(names)}.")


def read_fraction(config: Mapping[str, Any], name: str, *, default: float) -> float:
    """Read a number from 0 to below 1: a dropout rate, an epsilon.

    Raises:  CheckpointError: it is no such number.
    """
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"config.json: {name}={value!r} must be a number from 0 to below 1.")
    return float(value)


def read_token_id(config: Mapping[str, Any], name: str, *, default: int | None, vocab_size: int) -> int:
    """Read the id of a special token.

    Args:    default: what `transformers` takes where config.json does not say; None if it must say.
    Raises:  CheckpointError: it is missing, several, or no row of the vocabulary.
    """
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise CheckpointError(
            f"config.json: {name}={value!r} must be one token id, from 0 to below vocab_size={vocab_size}."
        )
    return value
