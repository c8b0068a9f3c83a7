"""Choose who adds a layer's output to its residual, once, and say which.

kernels.bias_dropout_add   device   bytes an element in half precision, forward      kept for the backward pass
reference                  any      10; with dropout 15                              dropout's mask, 1 byte an element
fused                      cuda     6, Triton                                        a seed
                                    auto on a GPU where Triton can run

Megatron-Core's own fused one goes through torch.compile, which compiles again for every combination of shape, rate and
gradients and, after eight, runs plain torch with a warning in the log: a slower kernel than was chosen.
"""

from __future__ import annotations

import importlib
import logging
from typing import Literal, Protocol

from torch import Tensor

from megatron_xmtf.kernels.bias_dropout_add import reference
from megatron_xmtf.kernels.segment_attention.available import fused_or

__all__ = ["BiasDropoutAdd", "choose_bias_dropout_add"]

logger = logging.getLogger(__name__)


class BiasDropoutAdd(Protocol):
    """Residual + dropout(x + bias); see `reference.bias_dropout_add`."""

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor, *, dropout: float) -> Tensor:
        """Return [s, b, h], dtype of x."""


def choose_bias_dropout_add(
    wish: Literal["auto", "reference", "fused"], *, device: Literal["cpu", "cuda"] | None = None
) -> BiasDropoutAdd:
    """Return the implementation for a run.

    Args:    device: None: where this machine computes, a GPU if it has one.
    Raises:  ConfigError: the wish cannot be met.
    """
    name, why = fused_or("reference", wish=wish, key="bias_dropout_add", device=device)
    logger.info("bias, dropout and residual: %s%s", name, f", not fused: {why}" if why else "")
    if name == "reference":
        return reference.bias_dropout_add
    fused: BiasDropoutAdd = importlib.import_module("megatron_xmtf.kernels.bias_dropout_add.fused").bias_dropout_add
    return fused
