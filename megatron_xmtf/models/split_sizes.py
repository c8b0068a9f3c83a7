"""Rules of splitting that every architecture keeps: the padded vocabulary, and what tensor-parallel sizes divide."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_xmtf.errors import ConfigError

__all__ = ["VOCAB_DIVISOR", "check_tensor_parallel", "divisors", "padded_rows"]

VOCAB_DIVISOR = 128
"""The embedding's rows are a multiple of this, whatever the tensor-parallel size (Megatron-LM's default)."""


def padded_rows(vocab_size: int) -> int:
    """Round a vocabulary up to a multiple of `VOCAB_DIVISOR`; the extra rows are zero."""
    return -(-vocab_size // VOCAB_DIVISOR) * VOCAB_DIVISOR


def divisors(number: int, *, limit: int) -> list[int]:
    """Return the divisors of `number` up to `limit`."""
    return [i for i in range(1, min(number, limit) + 1) if number % i == 0]


def check_tensor_parallel(tp: int, *, sizes: Mapping[str, int]) -> None:
    """Check that everything which tensor-parallel ranks share divides.

    Args:    sizes: what is shared ("attention heads") -> how many there are.
    Raises:  ConfigError: names the size that does not divide, and what would.
    """
    for what, size in sizes.items():
        if size % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} does not divide the model's {size} {what}; "
                f"use one of {divisors(size, limit=64)}."
            )
