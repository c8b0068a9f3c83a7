"""Bias, dropout and residual in plain torch, one pass after the other; the oracle of the fused one.

x [s, b, h], bias [h], residual [s, b, h]  ->  residual + dropout(x + bias)

The same operations in the same order as Megatron-Core's unfused `bias_dropout_add`, so the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bias_dropout_add"]


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, *, dropout: float) -> Tensor:
    """Return residual + dropout(x + bias), dtype of `x`; dropout: probability, 0 outside of training."""
    added = x if bias is None else x + bias
    return residual.to(x.dtype) + torch.nn.functional.dropout(added, dropout)
