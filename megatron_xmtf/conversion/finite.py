"""Numbers of a weight on their way from one file to another: finite before and after a change of type."""

from __future__ import annotations

import math

import torch

from megatron_xmtf.conversion.huggingface_model import dtype_name
from megatron_xmtf.errors import NonFiniteError

__all__ = ["change_dtype", "check_finite", "convert_part"]


def check_finite(part: torch.Tensor, *, name: str) -> None:
    """Check that no number of a part of a weight is NaN or Inf.

    Raises:  NonFiniteError: one is.
    """
    if not _finite(part):
        raise NonFiniteError(f"{name} holds NaN or Inf; a model with such weights cannot be used.")


def change_dtype(part: torch.Tensor, dtype: torch.dtype | None, *, name: str) -> torch.Tensor:
    """Change the type of a finite part of a weight; None keeps it.

    Raises:  NonFiniteError: a number does not fit the new type.
    """
    if dtype is None or dtype == part.dtype:
        return part
    converted = part.to(dtype)
    if not _finite(converted):
        largest = part.abs().max()
        raise NonFiniteError(f"{name}: its largest weight {largest:.3g} does not fit {dtype_name(dtype)}.")
    return converted


def convert_part(part: torch.Tensor, *, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """Check and change the type of a part of a weight.

    Raises:  NonFiniteError: NaN or Inf, before or after.
    """
    check_finite(part, name=name)
    return change_dtype(part, dtype, name=name)


def _finite(part: torch.Tensor) -> bool:
    # The extremes carry NaN and Inf along; `isfinite` of a whole tensor would make a copy of it.
    return not part.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(part))
