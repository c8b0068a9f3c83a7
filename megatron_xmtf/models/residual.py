"""Megatron-Core's bias-dropout-add seam, filled with the implementation that was chosen at start."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_xmtf.kernels.bias_dropout_add import BiasDropoutAdd

__all__ = ["bias_dropout_add_seam"]

Addition = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def bias_dropout_add_seam(chosen: BiasDropoutAdd) -> Callable[[bool, bool], Addition]:
    """Return what a layer's spec takes: (training, fused) -> ((x, bias), residual, dropout) -> sum.

    Megatron-Core's own switch `fused` is left unread: `chosen` is fused or not.
    """

    def for_mode(training: bool, fused: bool) -> Addition:
        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            return chosen(*x_with_bias, residual, dropout=dropout if training else 0.0)

        return add

    return for_mode
